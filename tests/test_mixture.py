"""What an epoch visits when several sources are mixed, phase by phase; and CCM's loss on each kind of crop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.__main__ import main as finetune
from finetune.config import FinetuneConfig, HardNegativesConfig, PhaseConfig, SourceConfig
from finetune.mixture import Mixture, Phase, plan_phases
from finetune.train import load_data
from poserelay.batch import CropBatch
from poserelay.config import AdamConfig, DataConfig, InputConfig, LabelsConfig, ModelConfig, Named
from poserelay.datasets.sampling import EpochBatches, PhasedBatches, epoch_order
from poserelay.datasets.topdown import collate
from poserelay.heatmaps import encode, input_to_heatmap
from poserelay.losses import joints_mse
from poserelay.model import PoseModel, build_model
from poserelay.supervision import auxiliary_loss, gaussian_targets

from .test_training import ccm_arguments

MODEL = ModelConfig(
    Named("timm", {"model": "test_resnet"}),
    Named("ccm", {"channels": [8, 8]}),
    skeleton="coco17",
    input=InputConfig(64, 64),
)


def heatmap_loss(maps: torch.Tensor, batch: CropBatch, model: PoseModel) -> torch.Tensor:
    return joints_mse(maps, *gaussian_targets(batch, model, (16, 16), 1.5, quantize=False))


class Numbers:
    """A source whose crops are their own indices."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, generator: Any) -> Any:
        return self.name, index, float(generator(0).random())


def config(**fields: Any) -> FinetuneConfig:
    more = {
        "external": SourceConfig("a.json", "a"),
        "hard_negatives": HardNegativesConfig("h.json"),
        "pseudo_labelled": SourceConfig("u.json", "u"),
    }
    return FinetuneConfig(MODEL, DataConfig("c.json", "c"), "run", **{**more, **fields})


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    drawn=st.lists(st.integers(0, 25), min_size=3, max_size=3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_draws_of_each_source_as_often_as_its_phase_says(
    sizes: list[int], drawn: list[int], epoch: int
) -> None:
    counts = (*tuple(drawn[: len(sizes) - 1]), drawn[-1] + 1)
    sources: list[Any] = [Numbers(str(number), size) for number, size in enumerate(sizes)]
    mixture = Mixture(sources, [Phase("", counts, 0, 99, 0, 3, 1.0, (), drops_by_step=False)])
    order = mixture.order(5, epoch)
    assert len(order) == sum(counts)
    assert len(set(order.tolist())) == len(order)  # a repetition has a number, and so draws, of its own
    crops: list[Any] = [mixture.sample(int(index), lambda view: np.random.default_rng(view)) for index in order]
    visits = Counter(crop[:2] for crop in crops)
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        per_person = [visits[(str(number), person)] for person in range(size)]
        assert sum(per_person) == count
        assert max(per_person) - min(per_person) <= 1
    assert (mixture.order(5, epoch) == order).all()


def test_one_source_is_visited_as_it_would_be_alone() -> None:
    sources: list[Any] = [Numbers("C", 12)]
    mixture = Mixture(sources, [Phase("C", (12,), 0, 6, 0, 3, 1.0, (), drops_by_step=False)])
    for epoch in range(3):
        assert (mixture.order(7, epoch) == epoch_order(7, epoch, 12)).all()


def test_what_is_drawn_changes_from_epoch_to_epoch() -> None:
    sources: list[Any] = [Numbers("A", 50), Numbers("C", 10)]
    mixture = Mixture(sources, [Phase("AC", (10, 10), 0, 99, 0, 5, 1.0, (), drops_by_step=False)])
    drawn = [{int(index) for index in mixture.order(0, epoch) if index < 50} for epoch in range(4)]
    assert len(set(map(frozenset, drawn))) == 4


def test_phases_follow_each_other() -> None:
    """ACHU -> CH by hand: 10 labelled persons, a ratio of 2 of A, half of H; batches of 8."""
    asked = config(
        external=SourceConfig("a.json", "a", ratio=2.0),
        hard_negatives=HardNegativesConfig("h.json", ratio=0.5),
        optim=AdamConfig(batch_size=8, epochs=3, drops=(1,)),
        then=PhaseConfig("CH", epochs=2, lr=1e-4, drops=(1,)),
    )
    first, second = plan_phases(asked, {"A": 100, "C": 10, "H": 3, "U": 7}, 10, 8)
    assert (first.letters, first.drawn, first.per_epoch, first.steps) == ("ACHU", (20, 10, 5, 7), 5, 15)
    assert (second.letters, second.drawn, second.per_epoch, second.steps) == ("CH", (0, 10, 5, 0), 1, 2)
    assert (second.first_step, second.first_epoch, second.end) == (15, 3, 17)
    assert [first.epoch(step) for step in (0, 4, 5, 14)] == [0, 0, 1, 2]
    assert [second.epoch(step) for step in (15, 16)] == [3, 4]
    assert [first.lr(0), first.lr(5), second.lr(15), second.lr(16)] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


def test_phases_in_steps_and_by_default_everything() -> None:
    asked = config(optim=AdamConfig(batch_size=8, steps=7, drops=(3,)), then=PhaseConfig(steps=4, lr=1e-4, drops=(2,)))
    first, second = plan_phases(asked, {"A": 6, "C": 10, "H": 3, "U": 7}, 10, 8)
    assert (first.drawn, first.steps, second.drawn, second.first_epoch) == ((6, 10, 3, 7), 7, (6, 10, 3, 7), 3)
    assert [first.lr(2), first.lr(3), second.lr(8), second.lr(9)] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])
    alone = config(train_on="C", optim=AdamConfig(batch_size=8, steps=7, drops=()))
    assert [phase.drawn for phase in plan_phases(alone, {"A": 6, "C": 10, "H": 3, "U": 7}, 10, 8)] == [(0, 10, 0, 0)]


def test_batches_of_phases_resume_in_either() -> None:
    def batches(step: int) -> list[list[tuple[int, int]]]:
        lengths = [(7, 4, 0, 0), (5, 3, 4, 2)]
        return list(
            PhasedBatches(
                [
                    EpochBatches(length, 2, steps, start_step=min(max(0, step - first), steps), first_epoch=epoch)
                    for length, steps, first, epoch in lengths
                ]
            )
        )

    whole = batches(0)
    assert len(whole) == 7
    assert whole[4] == [(2, 0), (2, 1)]
    for step in range(8):
        assert batches(step) == whole[step:]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_on": "CX"}, "expected letters of A"),
        ({"train_on": "CC"}, "each once"),
        ({"train_on": ""}, "at least one letter"),
        ({"train_on": "AC", "external": SourceConfig()}, "external.annotations is null"),
        ({"then": PhaseConfig("H", epochs=1), "hard_negatives": HardNegativesConfig()}, "hard_negatives.detections"),
        ({"external": SourceConfig("a.json")}, "go together"),
        ({"external": SourceConfig("a.json", "a", ratio=0.0)}, "external.ratio is 0.0"),
        ({"then": PhaseConfig("C")}, "no then.epochs or then.steps"),
        ({"then": PhaseConfig(epochs=2, drops=(3, 2))}, "then.drops"),
        ({"then": PhaseConfig(steps=0)}, "then.steps is 0"),
        ({"then": PhaseConfig(steps=2, epochs=2)}, "are both given"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight is -1.0"),
    ],
)
def test_strategies_that_cannot_be_are_told(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**fields)


def test_joints_of_another_skeleton_are_matched_by_name_and_the_rest_not_supervised(
    people: Path, tmp_path: Path
) -> None:
    ccm_arguments(people, tmp_path / "run")
    data = load_data(
        FinetuneConfig(
            MODEL,
            DataConfig(str(people / "annotations.json"), str(people / "images")),
            "run",
            external=SourceConfig(str(tmp_path / "limbs.json"), str(people / "images")),
            hard_negatives=HardNegativesConfig(str(tmp_path / "detections.json")),
            labels=LabelsConfig(count=10),
        )
    )
    truth = {person["id"]: person for person in json.loads((people / "annotations.json").read_text())["annotations"]}
    model = build_model(MODEL)
    persons = [data.sources["A"].evaluation_sample(index) for index in range(4)]
    batch = collate(persons)
    assert (batch.visibility[:, :5] == 0).all()
    for row, crop in enumerate(persons):
        found = np.array(truth[crop.annotation_id or 0]["keypoints"]).reshape(17, 3)[5:, 2]
        assert batch.visibility[row, 5:].tolist() == found.tolist()
    # Whatever the network says of the joints that the external skeleton lacks, the loss does not move.
    maps = torch.rand(4, 17, 16, 16)
    loss = heatmap_loss(maps, batch, model)
    other = torch.cat([torch.rand(4, 5, 16, 16), maps[:, 5:]], 1)
    assert heatmap_loss(other, batch, model) == loss
    assert heatmap_loss(torch.cat([maps[:, :5], other[:, :12]], 1), batch, model) != loss
    nobody = collate([data.sources["H"].evaluation_sample(0)])
    assert nobody.negative is not None
    assert nobody.negative.all()
    expected = 0.5 * maps[:1].square().mean()  # zero maps, every joint with weight 1
    torch.testing.assert_close(heatmap_loss(maps[:1], nobody, model), expected)
    # With a choice of labels only its pictures tell where nobody is.
    chosen = set(data.labels.images)
    assert {data.sources["H"].evaluation_sample(index).image_id for index in range(len(data.sources["H"]))} <= chosen


def test_the_loss_is_equation_8_of_labelled_joints() -> None:
    torch.manual_seed(0)
    model = build_model(MODEL)
    keypoints = torch.rand(2, 17, 2) * 63
    visibility = torch.randint(0, 3, (2, 17))
    batch = CropBatch(
        images=torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        keypoints=keypoints,
        visibility=visibility,
        affine=torch.eye(2, 3).expand(2, 2, 3),
        boxes=torch.zeros(2, 4),
        scores=torch.ones(2),
        areas=torch.ones(2),
        image_ids=[1, 2],
        annotation_ids=[1, 2],
        negative=torch.tensor([False, True]),
    )
    maps = torch.rand(2, 17, 16, 16)
    total = 0.0
    for person in range(2):
        for joint in range(17):
            if person == 1:
                total += maps[person, joint].square().sum()
            elif visibility[person, joint]:
                place = input_to_heatmap(keypoints[person, joint], (64, 64), (16, 16))
                target = encode(place[None], torch.ones(1), (16, 16), 1.5)[0]
                total += (maps[person, joint] - target).square().sum()
    expected = total / (2 * 17 * 16 * 16) / 2
    batch.visibility[1] = 0
    torch.testing.assert_close(heatmap_loss(maps, batch, model), torch.as_tensor(expected))
    # The auxiliary maps are twice as fine: their Gaussians are as wide on the crop.
    assert model.heatmap_size == (8, 8)
    fine = torch.rand(2, 17, 16, 16)
    twice = joints_mse(fine, *gaussian_targets(batch, model, (16, 16), 3.0, quantize=False))
    torch.testing.assert_close(auxiliary_loss(fine, batch, model, 1.5, quantize=False), twice)


def test_the_start_says_what_is_mixed_and_the_hand_off_names_no_path(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ccm_arguments(people, tmp_path / "run", "--save_every", "50")
    assert finetune(arguments) == 0
    said = capsys.readouterr().err
    assert "not supervised there: nose, left_eye, right_eye, left_ear, right_ear" in said
    assert "from step" in said
    assert "on CH" in said
    assert str(tmp_path).encode() not in (tmp_path / "run/export/model.safetensors").read_bytes()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    for row in rows:
        scio = [row.get(f"{part}_loss", 0) for part in ("prediction", "verification", "displaced")]
        assert row["loss"] == pytest.approx(row["main_loss"] + 0.5 * row["auxiliary_loss"] + sum(scio))
    assert {row["lr"] for row in rows} == {1e-3, 1e-4}
    # The exported auxiliary decoder goes on to the next stage, and a resumed command finds the run done.
    assert finetune(arguments) == 0
    more = ("--init_from", str(tmp_path / "run/export/model.safetensors"), "--then", "{epochs: 0}")
    assert finetune(ccm_arguments(people, tmp_path / "next", *more, "--then.train_on", "null")) == 0


def test_persons_without_a_joint_of_the_skeleton_are_left_out_and_counted(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = json.loads((people / "annotations.json").read_text())
    unseen = [0, 0, 0] * 17
    for number, person in enumerate(truth["annotations"]):
        person["keypoints"] = ([5, 5, 2] if number else person["keypoints"][:3]) + [5, 5, 2] + unseen
        if number:
            person["keypoints"][:3] = [0, 0, 0]
    truth["categories"][0]["keypoints"] = ["nose", "tail", *(f"point{number}" for number in range(17))]
    truth["annotations"][0]["keypoints"][:3] = [5, 5, 2]
    external = tmp_path / "tails.json"
    external.write_text(json.dumps(truth))
    more = ("--external.annotations", str(external), "--save_every", "50", "--labels.drop", "invisible")
    assert finetune(ccm_arguments(people, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().err
    assert f"{len(truth['annotations']) - 1} persons without a joint of coco17 left out" in said
    assert "not joints of coco17: tail, point0" in said
    assert "labelled joints are taken away" in said
    truth["annotations"] = truth["annotations"][1:]
    external.write_text(json.dumps(truth))
    assert finetune(ccm_arguments(people, tmp_path / "other", *more)) == 2
    assert "has a labelled joint of skeleton coco17" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
