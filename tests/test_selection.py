"""What to label: planted clusters, naive loops, and the command on pictures of a few textures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finetune.__main__ import main as finetune
from poserelay.__main__ import main as poserelay
from poserelay.checkpoint import describe, read_export, write_export
from poserelay.command import to_plain
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.model import build_backbone
from poserelay.neighbours import Backend, unit
from poserelay.run import file_sha256
from poserelay.selection import Method, cluster, distinct, duplicate_limit, fill_empty, k_centre, seed_centres, select
from poserelay.subsets import Subset, is_subset, read_subset, write_subset

METHODS: list[Method] = ["kmeans", "kcentre"]
BACKENDS: list[Backend] = ["torch", "faiss"]
SIZES = (200, 100, 50, 25, 12, 6, 3)


def random_vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Vectors `[396, 32]` of 7 clusters of very unequal sizes, in random order, and their clusters `[396]`."""
    generator = torch.Generator().manual_seed(seed)
    means = normalize(torch.randn(len(SIZES), 32, generator=generator), dim=1)
    label = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    label = label[torch.randperm(len(label), generator=generator)]
    return means[label] + 0.03 * torch.randn(len(label), 32, generator=generator), label


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_a_choice_covers_every_planted_cluster_where_a_random_draw_does_not(method: Method, seed: int) -> None:
    vectors, label = planted(seed)
    chosen = select(vectors, 14, method=method, seed=seed).chosen
    drawn = np.random.default_rng(seed).permutation(len(vectors))[:14]
    assert len(set(chosen)) == 14
    assert set(label[chosen].tolist()) == set(range(7))
    assert len(set(label[drawn].tolist())) < 7


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_covers_what_the_included_pictures_do_not(method: Method) -> None:
    vectors, label = planted(0)
    covered = label < 4
    chosen = select(vectors[~covered], 3, method=method, included=vectors[covered]).chosen
    assert set(label[~covered][chosen].tolist()) == {4, 5, 6}
    # among all of them too, the three rare clusters come first
    candidates = torch.cat([vectors[covered][::2], vectors[~covered]])
    of = torch.cat([label[covered][::2], label[~covered]])
    chosen = select(candidates, 3, method=method, included=vectors[covered][1::2]).chosen
    assert set(of[chosen].tolist()) == {4, 5, 6}


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_is_a_function_of_its_seed(method: Method) -> None:
    vectors, _ = planted(1)
    first, *others = (
        select(vectors, 9, method=method, seed=4, duplicate_similarity=0.999, backend=backend)
        for backend in ("torch", "torch", "faiss")
    )
    assert first == others[0] == others[1]
    assert first.distinct == 396
    torch.manual_seed(5)
    assert select(vectors, 9, method=method, seed=4) == first
    assert (select(vectors, 9, method=method, seed=5) == first) == (method == "kcentre")


def naive_k_centre(vectors: Tensor, count: int, fixed: Tensor) -> list[int]:
    centres = list(fixed.double())
    chosen: list[int] = []
    if not centres:
        mean = unit(vectors.double().sum(0)[None])[0].double()
        chosen.append(max(range(len(vectors)), key=lambda i: float(vectors[i].double() @ mean)))
    while len(chosen) < count:
        taken = [*centres, *(vectors[index].double() for index in chosen)]
        rest = [index for index in range(len(vectors)) if index not in chosen]
        chosen.append(min(rest, key=lambda i: max(float(vectors[i].double() @ centre) for centre in taken)))
    return chosen


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(1, 15), st.integers(0, 4), st.integers(1, 5), st.integers(0, 99))
def test_k_centre_takes_the_farthest_next(n: int, count: int, m: int, d: int, seed: int) -> None:
    vectors = unit(random_vectors(seed, n + m, d))
    fixed, vectors = vectors[:m], vectors[m:]
    assert k_centre(vectors, min(count, n), fixed) == naive_k_centre(vectors, min(count, n), fixed)


def test_k_centre_is_within_twice_the_best_radius() -> None:
    """The bound of Gonzalez (1985), which the best of all 220 choices of three gives."""
    for seed in range(10):
        vectors = unit(random_vectors(seed, 12, 3))
        distances = torch.cdist(vectors, vectors)
        best = min(float(distances[:, list(three)].amin(1).max()) for three in itertools.combinations(range(12), 3))
        assert best <= float(distances[:, k_centre(vectors, 3, vectors[:0])].amin(1).max()) <= 2 * best


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [0, 3])
def test_clusters_are_a_fixed_point_of_lloyds_algorithm(backend: Backend, m: int) -> None:
    vectors = unit(random_vectors(0, 300, 8))
    fixed = unit(random_vectors(1, m, 8))
    similarity, label = cluster(vectors, 12, fixed, backend=backend)
    means = [normalize(vectors[label == index].mean(0), dim=0) for index in range(12)]
    centres = torch.stack([*fixed, *means])
    nearest_similarity, nearest_label = (vectors @ centres.T).max(1)
    assert torch.equal(nearest_label - m, label)
    torch.testing.assert_close(similarity, nearest_similarity)
    assert (label < 0).any() == (m > 0)


def test_clusters_are_as_tight_as_those_of_faiss() -> None:
    vectors = unit(random_vectors(0, 2000, 6) + 2 * random_vectors(1, 30, 6).repeat_interleave(67, 0)[:2000])
    peer = faiss.Kmeans(6, 40, niter=50, spherical=True, seed=1, verbose=False)
    peer.train(vectors.numpy())
    theirs = float((vectors @ torch.from_numpy(peer.centroids).T).amax(1).mean())
    ours = float(cluster(vectors, 40, vectors[:0])[0].mean())
    assert 1 - ours < 1.02 * (1 - theirs)


def test_the_picture_of_a_cluster_is_the_one_nearest_to_its_centre() -> None:
    vectors = unit(random_vectors(0, 300, 8))
    similarity, label = cluster(vectors, 12, vectors[:0], seed=2)
    expected = [
        max(torch.nonzero(label == i)[:, 0].tolist(), key=lambda row: float(similarity[row])) for i in range(12)
    ]
    assert select(vectors, 12, method="kmeans", seed=2).chosen == sorted(expected)


def test_an_empty_cluster_takes_the_least_similar_vector_that_can_be_spared() -> None:
    similarity = torch.tensor([0.9, 0.1, 0.5, 0.6, 0.2])
    label = torch.tensor([0, 1, 0, 0, -1])
    fill_empty(similarity, label, 4)
    # cluster 1's only vector stays; the fixed centre's goes first, then the worse of cluster 0
    assert label.tolist() == [0, 1, 3, 0, 2]
    assert similarity.tolist() == pytest.approx([0.9, 0.1, 1.0, 0.6, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_equal_pictures_are_as_many_choices_as_asked_for(method: Method) -> None:
    assert len(set(select(torch.ones(6, 3), 4, method=method).chosen)) == 4
    assert len(select(torch.ones(6, 3), 6, method=method, included=torch.ones(2, 3)).chosen) == 6
    assert sorted(seed_centres(unit(torch.ones(6, 3)), 6, torch.empty(0, 3), seed=0)) == [0, 1, 2, 3, 4, 5]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 9), st.floats(0.3, 0.99), st.integers(0, 99))
def test_near_duplicates_of_what_is_kept_are_dropped(
    n: int, fixed: int, chunk: int, similarity: float, seed: int
) -> None:
    vectors = unit(random_vectors(seed, n, 3))
    kept: list[int] = []
    for row in range(n):
        if row < fixed or all(float(vectors[row].double() @ vectors[k].double()) <= similarity for k in kept):
            kept.append(row)
    found = distinct(vectors, similarity, fixed=fixed, chunk=chunk)
    assert torch.nonzero(found)[:, 0].tolist() == kept


def test_duplicates_are_told_by_their_distance_beside_that_of_other_pairs() -> None:
    """Whatever direction all the embeddings share, as long as float32 holds what differs."""
    vectors = random_vectors(0, 50, 64)
    vectors[40:] = vectors[:10] + 0.05 * random_vectors(1, 10, 64)
    pairs = unit(vectors).double() @ unit(vectors).double().T
    scaled = 1 - (1 - 0.9) / (1 - float(pairs.mean()))
    assert duplicate_limit(unit(vectors), scaled) == pytest.approx(0.9)
    for shared in (0, 3, 10):
        alike = vectors + shared
        assert select(alike, 40, method="kcentre", duplicate_similarity=0.95) == (list(range(40)), 40)
        assert select(alike, 40, method="kcentre", duplicate_similarity=0.9999).distinct == 50
    # copies are recognised though nothing else is there to compare with
    assert select(torch.full((9, 64), 0.3), 1, method="kcentre", duplicate_similarity=0.9999).distinct == 1


def test_more_than_the_distinct_pictures_cannot_be_chosen() -> None:
    vectors = torch.cat([torch.eye(3), torch.eye(3) + 0.01])
    assert select(vectors, 3, method="kcentre", duplicate_similarity=0.98).chosen == [0, 1, 2]
    with pytest.raises(UserError, match="count is 4, but of 6 readable pictures only 3 are distinct"):
        select(vectors, 4, method="kcentre", duplicate_similarity=0.98)
    with pytest.raises(UserError, match="only 2 are distinct"):
        select(vectors, 3, method="kmeans", duplicate_similarity=0.98, included=torch.eye(3)[:1])
    assert len(select(vectors, 6, method="kmeans", duplicate_similarity=1).chosen) == 6


# --- the list -------------------------------------------------------------------------------------------------------

SUBSET = Subset(["a.jpg", "é/b.jpg"], ["c.jpg"], "kmeans", 2, 7, 0.98, "0" * 64)


def test_a_list_is_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "subset.json"
    write_subset(file, SUBSET)
    assert is_subset(file)
    assert read_subset(file) == SUBSET
    assert SUBSET.labelled == ["a.jpg", "c.jpg", "é/b.jpg"]
    document = json.loads(file.read_text())
    assert (document["format"], document["kind"], document["images"]) == (1, "images", ["a.jpg", "é/b.jpg"])


def test_a_changed_list_is_told(tmp_path: Path) -> None:
    file = tmp_path / "subset.json"
    write_subset(file, SUBSET)
    document = json.loads(file.read_text())
    for change in ({"images": ["a.jpg"]}, {"included": None}, {"sha256": None}, {"seed": 8}):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(UserError, match="changed since it was written"):
            read_subset(file)
    file.write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(UserError, match="format 2, this version reads 1"):
        read_subset(file)
    for text in ("{", "[1]", "{}", json.dumps({"images": []}), "\xff"):
        file.write_text(text, encoding="latin-1")
        assert not is_subset(file)
        with pytest.raises(UserError, match="not a list of pictures"):
            read_subset(file)
    with pytest.raises(UserError, match="no such file"):
        read_subset(tmp_path / "absent")


# --- the command ----------------------------------------------------------------------------------------------------


def picture(kind: int, generator: np.random.Generator) -> np.ndarray:
    """64 x 64 pixels of one of four textures, noisy and of some brightness."""
    y, x = np.mgrid[:64, :64]
    base = [
        np.stack([x * 0 + 220, x * 0 + 30, x * 0 + 30], 2),
        np.stack([x * 0 + 20, x * 0 + 20, y * 3 + 40], 2),
        np.repeat(((x // 4 + y // 4) % 2 * 230)[..., None], 3, 2),
        np.stack([x * 0, (y // 8 % 2) * 200, x * 0 + 90], 2),
    ][kind]
    return np.clip(generator.uniform(0.75, 1) * base + generator.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures: 30, 6, 3 and 1 of four textures, called after them; and copies of two."""
    folder = tmp_path_factory.mktemp("textures")
    generator = np.random.default_rng(0)
    kinds = generator.permutation(np.repeat(np.arange(4), [30, 6, 3, 1])).tolist()
    for index, kind in enumerate(kinds):
        name = folder / f"sub{index % 2}" / f"{index:02d}_{kind}.png"
        name.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(name), picture(kind, generator)[..., ::-1])
    for copied in sorted(folder.rglob("*.png"))[:2]:
        copied.with_name(f"copy_{copied.name}").write_bytes(copied.read_bytes())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "model.safetensors"
    torch.manual_seed(0)
    config = ModelConfig(Named("timm", {"model": "test_resnet"}), input=InputConfig(height=64, width=64))
    backbone = build_backbone(config.backbone)
    described = describe(
        stage="pretrain", method="", model=to_plain(config), skeleton=None, config={}, upstream=None, metrics={}
    )
    write_export(file, {f"backbone.{name}": value for name, value in backbone.state_dict().items()}, described)
    return file


def arguments(checkpoint: Path, images: Path, out: Path, count: int, *more: str) -> list[str]:
    files = ["--checkpoint", str(checkpoint), "--images", str(images), "--out", str(out)]
    return ["select", *files, "--count", str(count), "--workers", "0", "--duplicate_similarity", "0.99999", *more]


def kinds(names: list[str]) -> set[str]:
    return {name[-5] for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_the_command_covers_every_texture(
    checkpoint: Path, images: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "subset.json"
    assert poserelay(arguments(checkpoint, images, out, 6, "--method", method)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "select: 6 of 42 pictures" in printed.err
    assert "; 2 near-duplicates and 0 unreadable left out" in printed.err
    subset = read_subset(out)
    assert kinds(subset.images) == set("0123")
    assert len(subset.images) == subset.count == 6
    assert subset.images == sorted(subset.images)
    assert all((images / name).is_file() for name in subset.images)
    assert subset.checkpoint_sha256 == file_sha256(checkpoint)
    assert (subset.method, subset.seed, subset.included) == (method, 0, [])
    again = tmp_path / "again.json"
    more = ["--method", method, "--workers", "2", "--batch_size", "64"]
    assert poserelay(arguments(checkpoint, images, again, 6, *more)) == 0
    assert again.read_bytes() == out.read_bytes()
    drawn = np.random.default_rng(0).choice(sorted(file.name for file in images.rglob("*.png")), 6, replace=False)
    assert kinds(drawn.tolist()) < set("0123")


def test_an_earlier_list_is_complemented(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    names = sorted(file.relative_to(images).as_posix() for file in images.rglob("*.png"))
    before = [name for name in names if name[-5] in "03"]
    write_subset(tmp_path / "before.json", Subset(before, [], "kmeans", len(before), 0, 0.98, ""))
    out = tmp_path / "more.json"
    for method in METHODS:
        more = ["--include", str(tmp_path / "before.json"), "--method", method]
        assert poserelay(arguments(checkpoint, images, out, 2, *more)) == 0
        subset = read_subset(out)
        assert kinds(subset.images) == set("12")
        assert subset.included == before
        assert not set(subset.images) & set(before)


def test_coco_files_name_the_candidates_and_the_labelled(checkpoint: Path, people: Path, tmp_path: Path) -> None:
    data = json.loads((people / "annotations.json").read_text())
    names = [image["file_name"] for image in data["images"]]
    few, labelled = tmp_path / "few.json", tmp_path / "labelled.json"
    few.write_text(json.dumps({"images": data["images"][3:12]}))
    one = data["images"][4]["id"]
    kept = [annotation for annotation in data["annotations"] if annotation["image_id"] == one]
    labelled.write_text(json.dumps({**data, "annotations": kept}))
    out = tmp_path / "subset.json"
    command = arguments(checkpoint, people / "images", out, 8, "--annotations", str(few), "--include", str(labelled))
    assert poserelay(command) == 0
    subset = read_subset(out)
    assert subset.included == [names[4]]
    assert subset.images == sorted(set(names[3:12]) - {names[4]})
    assert poserelay([*command[:7], "--count", "9", *command[9:]]) == 2


def test_unreadable_pictures_are_left_out_with_a_warning(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(1)
    for kind in range(4):
        cv2.imwrite(str(tmp_path / f"{kind}.png"), picture(kind, generator))
    (tmp_path / "1.png").write_bytes(b"broken")
    out = tmp_path / "subset.json"
    assert poserelay(arguments(checkpoint, tmp_path, out, 3)) == 0
    assert "warning: left out: " + str(tmp_path / "1.png") in capsys.readouterr().err
    assert read_subset(out).images == ["0.png", "2.png", "3.png"]
    assert poserelay(arguments(checkpoint, tmp_path, out, 4)) == 2
    assert "count is 4, but of 3 readable pictures only 3 are distinct" in capsys.readouterr().err
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"")
    assert poserelay(arguments(checkpoint, tmp_path, out, 1)) == 2
    assert "of 0 readable pictures" in capsys.readouterr().err
    assert read_subset(out).images == ["0.png", "2.png", "3.png"]


def test_what_the_user_can_do_wrong(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "subset.json"

    def fails(message: str, *command: str) -> None:
        assert poserelay(list(command)) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

    fails("count is 0, expected at least 1", *arguments(checkpoint, images, out, 0))
    fails("count is 43, but only 42 pictures", *arguments(checkpoint, images, out, 43))
    fails("not a hand-off file", *arguments(next(images.rglob("*.png")), images, out, 3))
    fails("no such folder", *arguments(checkpoint, tmp_path / "absent", out, 3))
    fails("no picture in it", *arguments(checkpoint, tmp_path, out, 3))
    fails("duplicate_similarity is 2", *arguments(checkpoint, images, out, 3, "--duplicate_similarity", "2"))
    fails("absent: cannot be read", *arguments(checkpoint, images, out, 3, "--include", str(tmp_path / "absent")))
    write_subset(tmp_path / "foreign.json", Subset(["x.png"], [], "kmeans", 1, 0, 0.98, ""))
    fails("x.png: no such picture", *arguments(checkpoint, images, out, 3, "--include", str(tmp_path / "foreign.json")))
    precious = tmp_path / "annotations.json"
    precious.write_text("{}")
    fails("exists and is no list", *arguments(checkpoint, images, precious, 3))
    assert precious.read_text() == "{}"
    before = (tmp_path / "foreign.json").read_bytes()
    file = tmp_path / "foreign.json"
    fails("would write over what --include reads", *arguments(checkpoint, images, file, 3, "--include", str(file)))
    assert file.read_bytes() == before


def test_a_chosen_list_trains_a_pose_model(checkpoint: Path, people: Path, tmp_path: Path) -> None:
    """From the list to `labels.file`; equal lists under other names make equal hand-off files."""
    out = tmp_path / "subset.json"
    assert poserelay(arguments(checkpoint, people / "images", out, 5, "--duplicate_similarity", "1")) == 0
    (tmp_path / "other.json").write_bytes(out.read_bytes())
    config = {
        "model": {
            "backbone": {"name": "timm", "kwargs": {"model": "test_resnet"}},
            "head": {"name": "simple", "kwargs": {"deconv_channels": [8, 8]}},
            "skeleton": "coco17",
            "input": {"height": 64, "width": 64},
        },
        "data": {"annotations": str(people / "annotations.json"), "images": str(people / "images")},
        "optim": {"batch_size": 4, "lr_batch": 4, "epochs": 1, "drops": []},
        "threads": 1,
        "workers": 0,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))
    recipe = ["--config", str(tmp_path / "recipe.yaml")]
    exports = []
    for name in ("subset", "other"):
        run = ["--run_dir", str(tmp_path / name), "--labels.file", str(tmp_path / f"{name}.json")]
        assert finetune([*recipe, *run]) == 0
        exports.append(tmp_path / name / "export/model.safetensors")
    assert exports[0].read_bytes() == exports[1].read_bytes()
    assert read_export(exports[0])[1]["config"]["labels"]["file"] == file_sha256(out)
    data = json.loads((people / "annotations.json").read_text())
    chosen = {image["id"] for image in data["images"] if image["file_name"] in read_subset(out).images}
    rows = [json.loads(line) for line in (tmp_path / "subset/metrics.jsonl").read_text().splitlines()]
    persons = [a for a in data["annotations"] if a["image_id"] in chosen and a["num_keypoints"]]
    assert max(row["step"] for row in rows) == max(1, len(persons) // 4)
