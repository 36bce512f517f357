"""Online kNN on class folders: against a loop over the embeddings, and leaving training as it was."""

from __future__ import annotations

import math
import tarfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from poserelay import neighbours
from poserelay.backbones import Backbone
from poserelay.config import InputConfig, KnnConfig, Named
from poserelay.datasets.unlabelled import FilePictures, list_images
from poserelay.embeddings import embed
from poserelay.errors import CheckFailed, UserError
from poserelay.model import build_backbone
from pretrain.knn import load_online_knn

INPUT = InputConfig(height=32, width=32)
COLOURS = {"blue": (40, 60, 200), "green": (60, 120, 120), "red": (150, 70, 60)}


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(Named("timm", {"model": "test_resnet"})).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bank/ and queries/, each with pictures of three colours, so noisy that they are confused."""
    root = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for part, count in (("bank", 12), ("queries", 9)):
        for colour, rgb in COLOURS.items():
            folder = root / part / colour
            folder.mkdir(parents=True)
            for number in range(count):
                picture = generator.normal(generator.normal(rgb, 60), 20, (40, 44, 3))
                cv2.imwrite(str(folder / f"{number}.png"), np.clip(picture, 0, 255).astype(np.uint8)[..., ::-1])
    return root


def naive_top1(backbone: Backbone, bank: Path, queries: Path | None, k: int, temperature: float) -> float:
    def vectors(folder: Path) -> list[tuple[str, torch.Tensor]]:
        files = list_images(folder)
        return [(f.parent.name, v) for f, v in zip(files, embed(backbone, INPUT, FilePictures(files))[0], strict=True)]

    voters = vectors(bank)
    asked = vectors(queries) if queries else voters
    right = 0
    for row, (truth, query) in enumerate(asked):
        others = [voter for place, voter in enumerate(voters) if queries or place != row]
        ranked = sorted(((float(vector @ query), name) for name, vector in others), reverse=True)
        votes: dict[str, float] = defaultdict(float)
        for similarity, name in ranked[:k]:
            votes[name] += math.exp(similarity / temperature)
        right += max(votes, key=lambda name: votes[name]) == truth
    return right / len(asked)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (9, 0.07), (9, 1.0)])
def test_top1_is_that_of_a_loop(backbone: Backbone, pictures: Path, separate: bool, k: int, temperature: float) -> None:
    queries = pictures / "queries" if separate else None
    config = KnnConfig(
        str(pictures / "bank"), str(queries) if queries else None, neighbours=k, temperature=temperature, chunk=7
    )
    row = load_online_knn(config).evaluate(backbone, INPUT)
    assert row["top1"] == pytest.approx(naive_top1(backbone, pictures / "bank", queries, k, temperature))
    assert 0.4 < row["top1"] < 1
    assert {name: row[name] for name in ("bank", "queries", "unreadable", "neighbours", "temperature")} == {
        "bank": 36,
        "queries": 27 if separate else 36,
        "unreadable": 0,
        "neighbours": k,
        "temperature": temperature,
    }


def test_shards_and_torch_and_workers_give_the_same(
    backbone: Backbone, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KnnConfig(str(pictures / "bank"), str(pictures / "queries"), neighbours=9)
    row = load_online_knn(config).evaluate(backbone, INPUT)
    for part in ("bank", "queries"):
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in reversed(list_images(pictures / part)):
                tar.add(file, file.relative_to(pictures / part).as_posix())
    packed = KnnConfig(str(tmp_path / "bank"), str(tmp_path / "queries"), neighbours=9)
    assert load_online_knn(packed).evaluate(backbone, INPUT) == row
    for workers in (1, 2):
        assert load_online_knn(config).evaluate(backbone, INPUT, workers=workers) == row
    monkeypatch.setattr(neighbours, "_faiss", lambda: None)
    assert load_online_knn(config).evaluate(backbone, INPUT) == row


def test_training_goes_on_as_it_would_have(backbone: Backbone, pictures: Path) -> None:
    knn = load_online_knn(KnnConfig(str(pictures / "bank"), neighbours=5))

    def train(evaluated: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_backbone(Named("timm", {"model": "test_resnet"})).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32))[-1].square().mean().backward()
            optimizer.step()
            if evaluated:
                knn.evaluate(model, INPUT, workers=1)
        return list(model.state_dict().values())

    assert all(torch.equal(one, other) for one, other in zip(train(False), train(True), strict=True))


def test_unreadable_pictures_are_left_out(backbone: Backbone, pictures: Path, tmp_path: Path) -> None:
    for file in list_images(pictures / "bank")[::3]:
        copy = tmp_path / file.relative_to(pictures / "bank")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    whole = load_online_knn(KnnConfig(str(tmp_path), neighbours=5)).evaluate(backbone, INPUT)
    (tmp_path / "blue" / "zz.png").write_bytes(b"broken")
    knn = load_online_knn(KnnConfig(str(tmp_path), neighbours=5))
    assert knn.evaluate(backbone, INPUT) == {**whole, "unreadable": 1}
    greedy = load_online_knn(KnnConfig(str(tmp_path), neighbours=12))
    with pytest.raises(UserError, match=r"neighbours is 12, but only 11 readable pictures of .* can vote"):
        greedy.evaluate(backbone, INPUT)
    queries = tmp_path / "queries" / "blue"
    queries.mkdir(parents=True)
    (queries / "a.png").write_bytes(b"broken")
    knn = load_online_knn(KnnConfig(str(pictures / "bank"), str(queries.parent), neighbours=5))
    with pytest.raises(UserError, match="queries: none of its pictures can be read"):
        knn.evaluate(backbone, INPUT)


def test_a_diverged_backbone_stops_the_run(backbone: Backbone, pictures: Path) -> None:
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    with pytest.raises(CheckFailed, match="NaN"):
        load_online_knn(KnnConfig(str(pictures / "bank"), neighbours=5)).evaluate(backbone, INPUT)


def test_what_is_wrong_is_told_before_training(pictures: Path, tmp_path: Path) -> None:
    def fails(message: str, images: Path, queries: Path | None = None, k: int = 5) -> None:
        with pytest.raises(UserError, match=message):
            load_online_knn(KnnConfig(str(images), str(queries) if queries else None, neighbours=k))

    fails("all pictures are of one class, 'blue'", pictures / "bank" / "blue")
    fails("absent: no such folder", tmp_path / "absent")
    fails("no picture in it", tmp_path)
    fails("neighbours is 36, but only 35 pictures of .* can vote; lower it", pictures / "bank", k=36)
    load_online_knn(KnnConfig(str(pictures / "bank"), str(pictures / "queries"), neighbours=36))
    fails("but only 36 pictures", pictures / "bank", pictures / "queries", k=37)
    for name in ("blue", "mauve"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((pictures / "bank/blue/0.png").read_bytes())
    fails("queries .*: class 'mauve' is not among the 3 classes of .*; name the class", pictures / "bank", tmp_path)


@pytest.mark.parametrize("field", ["every", "neighbours", "chunk", "temperature"])
def test_fields_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=rf"knn\.{field} is 0, expected"):
        KnnConfig("images", **{field: 0})  # pyright: ignore[reportArgumentType]
