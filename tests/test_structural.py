"""SCIO's learning against loops over persons and groups; what is frozen over real steps, and what is not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune import train as training
from finetune.__main__ import main as finetune
from finetune.structural import (
    Side,
    Supervised,
    constraint_loop,
    constraint_loss,
    displace,
    displaced_loss,
    set_side,
    side_of,
)
from poserelay.checkpoint import read_export, write_export
from poserelay.config import Named
from poserelay.heads.scio import SCIO
from poserelay.model import PoseModel, build_model
from poserelay.run import read_metrics
from pretrain.__main__ import main as pretrain
from semi.__main__ import main as semi

from .test_scio import COCO, GROUPS, SIZE, crops, gaussian, inputs, naive, networks, pose_model
from .test_training import finetune_arguments, pretrain_arguments, semi_arguments

SIDES: tuple[Side, Side] = ("prediction", "verification")


def labels(persons: int = 3) -> tuple[Tensor, Tensor]:
    """Targets of 9 joints and their weights, 0 for some."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.rand(persons, 9, *SIZE, generator=generator, dtype=torch.float64)
    weight = torch.ones(persons, 9, dtype=torch.float64)
    weight[0, 6] = weight[1, 3] = weight[2, 0] = weight[2, 8] = 0
    return targets, weight


# --- losses


def naive_loop(
    made: SCIO, side: Side, maps: Tensor, features: Tensor, person: int, group: int
) -> tuple[Tensor, Tensor]:
    """D and A of one person and group, by the text around Eq. 9 to 11."""
    a, b, c, d = (maps[person, joint] for joint in GROUPS[group])
    f = features[person]
    if side == "prediction":
        distal = naive(made.prediction, group, torch.stack((a, b, c)), f)
        return distal, naive(made.verification, group, torch.stack((b, c, distal)), f)
    verified = naive(made.verification, group, torch.stack((b, c, d)), f)
    return naive(made.prediction, group, torch.stack((verified, b, c)), f), verified


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_eq_9_to_11_in_loops(side: Side) -> None:
    made, (maps, features), (targets, weight) = networks(), inputs(), labels()
    mse, l2 = 0.0, 0.0
    for person, group in itertools.product(range(3), range(3)):
        a, _, _, d = GROUPS[group]
        distal, verified = naive_loop(made, side, maps, features, person, group)
        for answer, joint in ((distal, d), (verified, a)):
            squares = float((answer - targets[person, joint]).square().sum())
            if weight[person, joint]:
                mse += 0.5 * squares / math.prod(SIZE)
                l2 += math.sqrt(squares)
    loop = constraint_loop(made, side, maps, features)
    assert float(constraint_loss(loop, made, targets, weight, "mse")) == pytest.approx(mse / 9, rel=1e-10)
    assert float(constraint_loss(loop, made, targets, weight, "l2")) == pytest.approx(l2 / 9, rel=1e-10)


@torch.no_grad()
def test_the_displaced_loss_in_a_loop() -> None:
    """A's map, fainter; only of groups whose A and D are both labelled."""
    made, (maps, _), (targets, weight) = networks(), inputs(), labels()
    share = torch.rand(3, 3, dtype=torch.float64)
    total, counted = 0.0, 0
    for person, (group, (a, _, _, d)) in itertools.product(range(3), enumerate(GROUPS)):
        if weight[person, a] and weight[person, d]:
            total += 0.5 * float((maps[person, group] - share[person, group] * targets[person, a]).square().mean())
            counted += 1
    assert counted == 9 - 4
    found = displaced_loss(maps[:, :3], share, made, targets, weight)
    assert float(found) == pytest.approx(total / 9, rel=1e-10)


# --- whose turn it is


def names_with_gradient(model: PoseModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.grad is not None and bool(value.grad.any())}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("freeze_base", [False, True])
@pytest.mark.parametrize("perturbed", [False, True])
def test_gradients_reach_one_side_and_the_base_unless_it_is_frozen(
    side: Side, freeze_base: bool, perturbed: bool
) -> None:
    model = pose_model()
    assert model.refiner is not None
    set_side(model.refiner, side)
    batch = crops(3)
    displaced = torch.rand(3, 6, 16, 16) if perturbed and side == "verification" else None
    found = Supervised(model, freeze_base=freeze_base)(model.preprocess(batch.images), side, displaced)
    assert (found.displaced is not None) == (displaced is not None)
    targets, weight = torch.rand(3, 17, 16, 16), torch.ones(3, 17)
    loss = constraint_loss(found.loop, model.refiner, targets, weight, "mse")
    if found.displaced is not None:
        loss = displaced_loss(found.displaced, torch.ones(3, 6), model.refiner, targets, weight)
    loss.backward()
    reached = names_with_gradient(model)
    own = {n for n, _ in model.named_parameters() if n.startswith(f"refiner.{side}.")}
    assert {name for name in reached if name.startswith("refiner.")} == own
    assert {name for name in reached if name.startswith("head.")} == (
        set() if freeze_base else {f"head.{name}" for name, _ in model.head.named_parameters()}
    )
    # timm's residual branches end in a batch norm of weight 0: nothing gets past it at first.
    assert ("backbone.network.conv1.0.weight" in reached) != freeze_base


def test_the_sides_take_turns() -> None:
    assert [side_of(epoch) for epoch in range(4)] == ["prediction", "verification", "prediction", "verification"]
    made = networks()
    for side, other in (SIDES, SIDES[::-1], SIDES):
        set_side(made, side)
        for name, trains in ((side, True), (other, False)):
            part = getattr(made, name)
            assert {module.training for module in part.modules()} == {trains}
            assert {value.requires_grad for value in part.parameters()} == {trains}


# --- displaced joints


def test_displaced_joints_are_as_far_off_as_their_share_says() -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.uniform(14, 26, (40, 6, 2)))
    moved = displace(truth, (40, 44), 2.0, 8.0, torch.Generator().manual_seed(3))
    y, x = np.mgrid[:40, :44]
    for person, group in itertools.product(range(40), range(6)):
        rendered = moved.distal[person, group].double().numpy()
        centre = np.array([(x * rendered).sum(), (y * rendered).sum()]) / rendered.sum()
        distance = np.linalg.norm(centre - truth[person, group].numpy())
        assert float(moved.share[person, group]) == pytest.approx(1 - distance / 8, abs=0.02)
        np.testing.assert_allclose(rendered, gaussian(centre, (40, 44), 2.0), atol=0.02)
    assert 0 <= moved.share.min() < 0.05
    assert 0.95 < moved.share.max() <= 1
    assert float(moved.share.mean()) == pytest.approx(0.5, abs=0.05)


def test_displacements_are_the_generators_alone() -> None:
    truth = torch.rand(4, 6, 2) * 10
    one, same, other = (displace(truth, (20, 20), 2.0, 5.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.rand(5)
    assert torch.equal(one.distal, same.distal)
    assert torch.equal(one.share, same.share)
    assert not torch.equal(one.share, other.share)
    moved = displace(truth + 3, (20, 20), 2.0, 5.0, torch.Generator().manual_seed(1))
    assert torch.equal(moved.share, one.share)
    still = displace(truth, (20, 20), 2.0, 0.0, torch.Generator().manual_seed(1))
    wanted = np.stack([[gaussian(xy, (20, 20), 2.0) for xy in person] for person in truth.numpy()])
    np.testing.assert_allclose(still.distal.numpy(), wanted, atol=1e-6)


# --- real steps

REFINER = ("--model.refiner", "{name: scio, kwargs: {feature_channels: 2, width: 4, dilations: [1, 2]}}")


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Any]]:
    """What the resume file of every step holds, as it can be read back."""
    states: dict[int, dict[str, Any]] = {}
    save = training.save_resume

    def remember(folder: Path, state: Any) -> None:
        save(folder, state)
        states[state["state"]["step"]] = torch.load(folder / "last.pt", weights_only=True)

    monkeypatch.setattr(training, "save_resume", remember)
    return states


def changed(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> set[str]:
    """Names in a part of the model, parameters and buffers, that differ in any bit."""
    return {name for name in before if name.startswith(part) and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("frozen", [False, True], ids=["joint", "frozen base"])
def test_freezing_is_real(
    people: Path, tmp_path: Path, saved: dict[int, dict[str, Any]], frozen: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over three epochs with a validation in between; and a run cut in a verification epoch ends with the same bytes.

    The frozen base is a model without the networks, which is said.
    """
    more = [*REFINER, "--optim.epochs", "3", "--optim.drops", "[]", "--save_every", "1"]
    more += ["--data.validation_annotations", str(people / "annotations.json"), "--validate_every", "2"]
    more += ["--decoding.scio.steps", "2", "--decoding.flip", "false", "--labels.count", "6"]
    if frozen:
        base = finetune_arguments(people, tmp_path / "base", "--optim.epochs", "1", "--optim.drops", "[]")
        assert finetune(base) == 0
        saved.clear()
        more += ["--init_from", str(tmp_path / "base/export/model.safetensors"), "--scio.freeze_base", "true"]
        more += ["--scio.norm", "l2"]
    else:
        more += ["--scio.perturb_distal", "3"]
    arguments = finetune_arguments(people, tmp_path / "run", *more)
    assert finetune(arguments) == 0
    assert ("initialised: the networks of model.refiner" in capsys.readouterr().err) == frozen
    protocol = json.loads((tmp_path / "run/done.json").read_text())["metrics"]["protocol"]
    assert (protocol["scio"], protocol["scio_steps"]) == ("optimisation", 2)
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    epochs = {row["step"]: row["epoch"] for row in rows}
    assert sorted(epochs) == sorted(saved)
    assert sorted(set(epochs.values())) == [0, 1, 2]
    steps = len(saved)
    torch.manual_seed(0)
    refiner = Named("scio", {"feature_channels": 2, "width": 4, "dilations": [1, 2]})
    small = replace(pose_model().config, head=Named("simple", {"deconv_channels": [8, 8]}), refiner=refiner)
    torch.manual_seed(0)
    made = build_model(small, COCO).state_dict()

    for step in range(1, steps + 1):
        before, after = saved[step - 1]["model"] if step > 1 else made, saved[step]["model"]
        trained, left = SIDES if epochs[step] % 2 == 0 else SIDES[::-1]
        assert not changed(before, after, f"refiner.{left}.")
        moved = changed(before, after, f"refiner.{trained}.")
        assert f"refiner.{trained}.layers.0.running_mean" in moved
        assert f"refiner.{trained}.to_heatmap.weight" in moved
        for part in ("backbone.", "head.") if step > 1 else ():
            assert bool(changed(before, after, part)) != frozen
    if frozen:
        given, _ = read_export(tmp_path / "base/export/model.safetensors")
        for part in ("backbone.", "head."):
            assert not changed(given, saved[steps]["model"], part)
            assert any(name.startswith(part) for name in given)
    for row in rows:
        one, other = SIDES if row["epoch"] % 2 == 0 else SIDES[::-1]
        assert f"{one}_loss" in row
        assert f"{other}_loss" not in row
        assert ("displaced_loss" in row) == (not frozen and one == "verification")
        parts = [row[f"{one}_loss"], row.get("displaced_loss", 0.0), 0.0 if frozen else row["main_loss"]]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-4)

    whole = (tmp_path / "run/export/model.safetensors").read_bytes()
    middle = next(step for step in epochs if epochs[step] == 1)
    assert epochs[middle + 1] == 1
    (tmp_path / "run/done.json").unlink()
    (tmp_path / "run/export/model.safetensors").unlink()
    (tmp_path / "run/resume/previous.pt").unlink()
    torch.save(saved[middle], tmp_path / "run/resume/last.pt")
    saved.clear()
    assert finetune(arguments) == 0
    assert min(saved) == middle + 1
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == whole


# --- mistakes

GROUPED = """
name: limbs
joints: [left_shoulder, left_elbow, left_wrist, left_hip, left_knee, left_ankle]
groups:
"""
ARM = "  - {proximal: [left_hip, left_shoulder, left_elbow], distal: left_wrist}\n"


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (ARM.replace("hip", "hp"), "field groups: unknown joint 'left_hp' (did you mean 'left_hip'?)"),
        (ARM.replace(", distal: left_wrist", ""), "field groups: expected a list of {proximal: [A, B, C], distal: D}"),
        (ARM + ARM.replace("hip", "knee"), "field groups: 'left_wrist' is the distal joint of two groups"),
        (ARM + ARM.replace("left_hip", "left_ankle").replace("wrist", "hip"), "'left_hip' is proximal in one group"),
        (ARM.replace("shoulder", "hip"), "names a joint twice"),
        ("  []\n", "model.refiner scio: skeleton 'limbs' declares no groups"),
    ],
)
def test_groups_that_cannot_be_end_the_start(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], groups: str, says: str
) -> None:
    (tmp_path / "limbs.yaml").write_text(GROUPED + groups)
    skeleton = ("--model.skeleton", str(tmp_path / "limbs.yaml"))
    assert finetune(finetune_arguments(people, tmp_path / "run", *REFINER, *skeleton)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "more", "says"),
    [
        (finetune, finetune_arguments, ("--scio.norm", "l2"), "scio has fields, but model.refiner is null"),
        (finetune, finetune_arguments, (*REFINER, "--scio.freeze_base", "true"), "scio.freeze_base needs init_from"),
        (finetune, finetune_arguments, (*REFINER, "--sigma", "3"), "kwargs.sigma is 2.0 (its default) and sigma 3.0"),
        (finetune, finetune_arguments, (*REFINER, "--scio.weight", "-1"), "scio.weight is -1"),
        (finetune, finetune_arguments, (*REFINER, "--decoding.scio.step", "0"), "decoding.scio.step is 0"),
        (finetune, finetune_arguments, (*REFINER, "--decoding.scio.radius", "-1"), "decoding.scio.radius is -1"),
        (finetune, finetune_arguments, ("--model.refiner", "{name: scoi}"), "did you mean 'scio'"),
        (finetune, finetune_arguments, ("--model.refiner", "{name: scio, kwargs: {widht: 3}}"), "no 'widht'"),
        (
            finetune,
            finetune_arguments,
            (*REFINER, "--scio.freeze_base", "true", "--freeze_backbone", "true", "--init_from", "x.safetensors"),
            "freeze_backbone and scio.freeze_base are both given",
        ),
        (semi, semi_arguments, REFINER, "model.refiner: finetune trains it"),
        (pretrain, pretrain_arguments, REFINER, "model.refiner: pretraining trains the backbone alone"),
    ],
)
def test_fields_that_do_not_go_together(
    people: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    arguments: Callable[..., list[str]],
    more: tuple[str, ...],
    says: str,
) -> None:
    assert main(arguments(people, tmp_path / "run", *more)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_base_that_cannot_be_left_as_it_is(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A backbone alone, joints that the file lacks, another alignment or sigma: refused before anything is written."""
    once = ("--optim.epochs", "1", "--optim.drops", "[]")
    assert finetune(finetune_arguments(people, tmp_path / "base", *once)) == 0
    whole = tmp_path / "base/export/model.safetensors"
    state, described = read_export(whole)
    backbone = {name: value for name, value in state.items() if name.startswith("backbone.")}
    write_export(tmp_path / "backbone.safetensors", backbone, {**described, "skeleton": None, "head": None})
    joints = [joint.replace("left_ear", "left_antler") for joint in COCO.joints]
    deer = {"name": "deer", "joints": joints, "flip_pairs": [], "sigmas": list(COCO.sigmas)}
    write_export(tmp_path / "deer.safetensors", state, {**described, "skeleton": deer})
    for file, more, says in (
        (tmp_path / "backbone.safetensors", (), "lacks a head"),
        (tmp_path / "deer.safetensors", (), "lacks joints left_ear"),
        (whole, ("--model.input.alignment", "udp"), "has model.input.alignment hrnet, this run udp"),
        (whole, ("--sigma", "1", "--model.refiner", "{name: scio, kwargs: {sigma: 1}}"), "has sigma 2.0, this run 1.0"),
    ):
        asked = [*REFINER, "--scio.freeze_base", "true", "--init_from", str(file), *more]
        assert finetune(finetune_arguments(people, tmp_path / "run", *asked)) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_nobody_with_a_distal_joint(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((people / "annotations.json").read_text())
    distal = [COCO.joints.index(group.distal) for group in COCO.groups]
    for kept in ([], [distal[-1]]):
        for person in data["annotations"]:
            triples = np.array(person["keypoints"]).reshape(-1, 3)
            triples[[joint for joint in distal if joint not in kept]] = 0
            person["keypoints"] = triples.flatten().tolist()
        (tmp_path / "truth.json").write_text(json.dumps(data))
        if kept:
            break
        more = ("--data.annotations", str(tmp_path / "truth.json"))
        assert finetune(finetune_arguments(people, tmp_path / "run", *REFINER, *more)) == 2
        message = capsys.readouterr().err
        assert f"{tmp_path / 'truth.json'}: nobody has a labelled distal joint (left_wrist, " in message
        assert not (tmp_path / "run").exists()
        data = json.loads((people / "annotations.json").read_text())
    more = ("--data.annotations", str(tmp_path / "truth.json"), "--optim.epochs", "1", "--optim.drops", "[]")
    assert finetune(finetune_arguments(people, tmp_path / "run", *REFINER, *more)) == 0
    message = capsys.readouterr().err
    assert "warning: nobody has a labelled left_wrist" in message
    assert "labelled right_ear" not in message
    assert "warning: one epoch trains the prediction networks alone" in message
