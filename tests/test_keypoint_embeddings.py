"""Retrieval and similarity against loops over pairs, sampling against torch's own and ramps, the command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn
from torch.nn.functional import grid_sample, normalize

from evaluation.__main__ import main
from evaluation.embeddings import Panel, checkpoint_names, draw_panels, draw_points, joint_styles, lay_out
from poserelay.backbones.hrnet import drop_unused_fuse
from poserelay.backbones.penultimate import penultimate_level
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco
from poserelay.datasets.topdown import TopDownDataset
from poserelay.errors import CheckFailed
from poserelay.keypoint_embeddings import (
    Points,
    at_best,
    by_chance,
    embed_joints,
    mean_cosines,
    neighbouring_joints,
    retrieved,
    sample_at,
    visible_joints,
)
from poserelay.keypoints import Skeleton, load_skeleton, packaged_skeletons
from poserelay.model import PoseModel, build_backbone, build_model

SMALL = Named("timm", {"model": "test_resnet"})
FLIP = (0, 2, 1, 4, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_points(seed: int, persons: int = 7, share: float = 0.7) -> Points:
    """Some of the five joints of each person, everyone's joint 0 among them."""
    has = torch.rand(persons, 5, generator=seeded(seed)) < share
    has[:, 0] = True
    whose, joints = has.nonzero(as_tuple=True)
    return Points(joints, whose)


def naive_shares(vectors: Tensor, points: Points, k: int, wanted: list[int]) -> list[float]:
    """Share of each point's k nearest of other persons that are the joint `wanted` names for it."""
    unit = normalize(vectors.double(), dim=1)
    similarity, joints, persons = (unit @ unit.T).tolist(), points.joints.tolist(), points.persons.tolist()
    shares = []
    for query, person in enumerate(persons):
        others = [i for i, whose in enumerate(persons) if whose != person]
        others.sort(key=lambda i: -similarity[query][i])
        shares.append(sum(joints[i] == wanted[query] for i in others[:k]) / k)
    return shares


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 11), share=st.sampled_from([0.2, 0.7, 1.0]))
def test_retrieval_is_that_of_a_loop(seed: int, k: int, share: float) -> None:
    points = random_points(seed, persons=12, share=share)
    vectors = torch.randn(len(points.joints), 6, generator=seeded(seed))
    shares = retrieved(vectors, points, k, FLIP)
    joints = points.joints.tolist()
    assert shares.same.tolist() == pytest.approx(naive_shares(vectors, points, k, joints))
    mirror = naive_shares(vectors, points, k, [FLIP[joint] for joint in joints])
    expected = [math.nan if joint == FLIP[joint] else m for joint, m in zip(joints, mirror, strict=True)]
    assert shares.mirror.tolist() == pytest.approx(expected, nan_ok=True)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.2, 0.7, 1.0]))
def test_chance_ceiling_and_cosines_are_those_of_loops(seed: int, share: float) -> None:
    points = random_points(seed, share=share)
    vectors = normalize(torch.randn(len(points.joints), 6, generator=seeded(seed)), dim=1)
    pairs = list(zip(points.joints.tolist(), points.persons.tolist(), strict=True))
    chance, best = by_chance(points, FLIP), at_best(points, 4)
    within, between = [], []
    for row, (joint, person) in enumerate(pairs):
        others = [(i, j) for i, (j, p) in enumerate(pairs) if p != person]
        same = [j == joint for _, j in others]
        assert float(chance.same[row]) == pytest.approx(np.mean(same))
        assert float(best[row]) == min(4, sum(same)) / 4
        if FLIP[joint] != joint:
            assert float(chance.mirror[row]) == pytest.approx(np.mean([j == FLIP[joint] for _, j in others]))
        for i, j in others:
            (within if j == joint else between).append(float(vectors[row].double() @ vectors[i].double()))
    expected = (np.mean(within), np.mean(between) if between else math.nan)
    assert mean_cosines(vectors, points) == pytest.approx(expected, nan_ok=True)


def test_a_perfect_embedding_a_mirrored_one_and_a_random_one() -> None:
    points = random_points(0, persons=200)
    noise = torch.randn(len(points.joints), 32, generator=seeded(1))
    centres = 100 * torch.eye(5, 32)
    perfect = retrieved(centres[points.joints] + noise, points, 10, FLIP)
    assert perfect.same.min() == 1
    assert perfect.mirror.nanmean() == 0
    assert neighbouring_joints(centres[points.joints], points, 10).eq(points.joints[:, None]).all()
    # whoever cannot tell left from right finds each as often
    sides_alike = centres[torch.tensor([0, 1, 1, 3, 3])][points.joints] + noise
    alike = retrieved(sides_alike, points, 10, FLIP)
    paired = points.joints > 0
    assert (alike.same + alike.mirror)[paired].min() == 1
    assert float(alike.mirror.nanmean()) == pytest.approx(0.5, abs=0.03)
    chance = by_chance(points, FLIP)
    random = retrieved(noise, points, 10, FLIP)
    assert float(random.same.mean()) == pytest.approx(float(chance.same.mean()), abs=0.02)
    assert float(random.mirror.nanmean()) == pytest.approx(float(chance.mirror.nanmean()), abs=0.02)


def test_a_persons_own_joints_are_no_neighbours() -> None:
    """Every joint of a person is at the same place, far from all others'."""
    points = random_points(3, persons=30, share=1.0)
    vectors = 10 * torch.randn(30, 8, generator=seeded(4))[points.persons]
    found = retrieved(vectors, points, 5, FLIP)
    assert float(found.same.mean()) == pytest.approx(0.2)  # the nearest other person's five joints
    with pytest.raises(ValueError, match="k is 146, expected at least 1 and at most the 145 joints of other persons"):
        retrieved(vectors, points, 146, FLIP)
    assert float(retrieved(vectors, points, 145, FLIP).same.mean()) == pytest.approx(29 / 145)


def test_a_joint_on_a_pixel_has_exactly_its_vector() -> None:
    maps = torch.randn(3, 7, 5, 4, generator=seeded(0))
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    xy = torch.stack([columns, rows], -1).flatten(0, 1).float().expand(3, -1, -1)
    assert torch.equal(sample_at(maps, xy), maps.flatten(2).transpose(1, 2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), height=st.integers(1, 6), width=st.integers(2, 6))
def test_between_pixels_it_is_torchs_bilinear(seed: int, height: int, width: int) -> None:
    maps = torch.randn(2, 3, height, width, generator=seeded(seed))
    xy = torch.rand(2, 8, 2, generator=seeded(seed + 1)) * torch.tensor([width + 1.0, height + 1.0]) - 1  # also outside
    grid = 2 * xy / torch.tensor([width - 1.0, max(height - 1.0, 1.0)]) - 1
    expected = grid_sample(maps, grid[:, :, None], padding_mode="border", align_corners=True)[..., 0].transpose(1, 2)
    torch.testing.assert_close(sample_at(maps, xy), expected, atol=1e-5, rtol=1e-5)


def small_model(seed: int = 0, skeleton: str = "coco17", **input: Any) -> PoseModel:
    torch.manual_seed(seed)
    head = Named("simple", {"deconv_channels": [8]})
    return build_model(ModelConfig(SMALL, head, None, skeleton, InputConfig(**{"height": 96, "width": 64, **input})))


def write_model(path: Path, model: PoseModel) -> str:
    described = describe(
        stage="finetune",
        method="simple",
        model=to_plain(model.config),
        skeleton=model.skeleton,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, model.state_dict(), described)
    return str(path)


class Ramp(nn.Module):
    """Maps whose third level holds, at each pixel, the input pixel x, y that it stands for, and 50."""

    def __init__(self, alignment: str) -> None:
        super().__init__()
        self.channels, self.strides, self.alignment = [0, 0, 3, 0], [4, 8, 16, 32], alignment
        self.network = nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        def axis(length: int) -> Tensor:
            last = length - 1 if self.alignment == "udp" else length - 16
            return torch.linspace(0, last, length // 16)

        height, width = images.shape[-2:]
        y, x = torch.meshgrid(axis(height), axis(width), indexing="ij")
        maps = torch.stack([x, y, torch.full_like(x, 50)]).expand(len(images), -1, -1, -1)
        return [images, images, maps, images]


@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
def test_joints_are_sampled_where_the_crop_shows_them(people: Path, alignment: Literal["hrnet", "udp"]) -> None:
    model = small_model(alignment=alignment)
    ramp: Any = Ramp(alignment)
    model.backbone = ramp
    dataset = TopDownDataset(
        read_coco(people / "annotations.json"), people / "images", model.skeleton, (96, 64), alignment=alignment
    )
    # moved to where some joints are cut off
    dataset.boxes[::3, 0] += 0.6 * dataset.boxes[::3, 2]
    taken = visible_joints(dataset)
    crops = [dataset.evaluation_sample(row) for row in range(len(dataset))]
    xy = np.stack([crop.keypoints for crop in crops])
    labels = np.stack([crop.visibility for crop in crops])
    seen = (labels == 2) & (xy[..., 0] >= -0.5) & (xy[..., 0] <= 63.5) & (xy[..., 1] >= -0.5) & (xy[..., 1] <= 95.5)
    assert np.array_equal(taken, seen)
    assert 0 < seen.sum() < (labels == 2).sum()

    rows = np.arange(2, len(dataset), 2)
    vectors = embed_joints(model, dataset, rows, taken[rows], batch_size=4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    found = (50 * vectors[:, :2] / vectors[:, 2:]).numpy()
    last = np.array([63, 95]) if alignment == "udp" else np.array([48, 80])
    np.testing.assert_allclose(found, np.clip(xy[rows][taken[rows]], 0, last), atol=1e-3)


def test_the_level_is_that_of_the_paper() -> None:
    with torch.device("meta"):
        hrnet = build_backbone(Named("timm", {"model": "hrnet_w18_small"}))
    drop_unused_fuse(hrnet)
    assert hrnet.strides[penultimate_level(hrnet)] == 4
    assert small_model().backbone.strides[penultimate_level(small_model().backbone)] == 16


def test_damaged_weights_stop(people: Path) -> None:
    model = small_model()
    next(model.parameters()).data.fill_(math.nan)
    dataset = TopDownDataset(read_coco(people / "annotations.json"), people / "images", model.skeleton, (96, 64))
    with pytest.raises(CheckFailed, match="NaN or infinity"):
        embed_joints(model, dataset, np.arange(2), visible_joints(dataset)[:2])


def asked(people: Path, checkpoints: list[str], out: Path, *more: str) -> list[str]:
    return [
        *("embeddings", "--checkpoints", json.dumps(checkpoints), "--annotations", str(people / "annotations.json")),
        *("--images", str(people / "images"), "--out", str(out), "--device", "cpu", "--workers", "0", *more),
    ]


def test_the_command(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two models one has other joints, in another order, and another input: measured are the 12 that both have."""
    first, second = small_model(), small_model(1, "lsp14", height=64, width=64)
    checkpoints = [
        write_model(tmp_path / "before/export/model.safetensors", first),
        write_model(tmp_path / "after/export/model.safetensors", second),
    ]
    argv = asked(people, checkpoints, tmp_path / "out", "--count", "12", "--neighbours", "5", "--method", "pca")
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    written = (tmp_path / "out/embeddings.json").read_bytes()
    assert json.loads(written) == report
    picture = cv2.imread(str(tmp_path / "out/embeddings.png"))
    assert picture is not None
    assert picture.std() > 5

    protocol, metrics = report["protocol"], report["metrics"]
    assert (protocol["split"], protocol["persons"], protocol["neighbours"]) == ("annotations", 12, 5)
    assert list(metrics) == list(protocol["checkpoints"]) == ["before", "after"]
    assert protocol["joints"] == [j for j in first.skeleton.joints if j in second.skeleton.joints]
    assert protocol["checkpoints"]["after"] | {"sha256": ""} == {
        **{"backbone": "timm", "map_stride": 16, "channels": first.backbone.channels[2], "input": "64x64"},
        **{"alignment": "hrnet", "sha256": ""},
    }
    annotations = read_coco(people / "annotations.json")
    chosen = annotations.persons[np.linspace(0, len(annotations.persons) - 1, 12).round().astype(int)]
    for joint in protocol["joints"]:
        count = int((annotations.visibility[chosen, annotations.joints.index(joint)] == 2).sum())
        assert metrics["before"]["joints"][joint]["points"] == metrics["after"]["joints"][joint]["points"] == count
    # the first model's numbers by a loop over its own embeddings, its joints in its own order
    dataset = TopDownDataset(annotations, people / "images", first.skeleton, (96, 64))
    common = np.isin(first.skeleton.joints, protocol["joints"])
    rows = np.flatnonzero(np.isin(annotations.persons, chosen))
    taken = visible_joints(dataset)[rows] & common
    whose, joints = (torch.from_numpy(indices) for indices in taken.nonzero())
    shares = naive_shares(embed_joints(first, dataset, rows, taken), Points(joints, whose), 5, joints.tolist())
    assert metrics["before"]["same"] == pytest.approx(np.mean(shares))
    ankle = joints == first.skeleton.joints.index("left_ankle")
    assert metrics["before"]["joints"]["left_ankle"]["same"] == pytest.approx(np.array(shares)[ankle].mean())
    assert metrics["before"]["points"] == len(shares)

    again = asked(people, checkpoints, tmp_path / "again", "--count", "12", "--neighbours", "5", "--method", "pca")
    assert main(again) == 0
    assert (tmp_path / "again/embeddings.json").read_bytes() == written
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["before", "after", "chance"]
    values = [metrics["before"]["same"], metrics["after"]["same"], metrics["before"]["same chance"]]
    assert lines[1].split() == ["same", "joint@5", *(f"{value:.4f}" for value in values)]


def test_tsne_of_few_persons(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_model(tmp_path / "model.safetensors", small_model())
    assert main(asked(people, [checkpoint], tmp_path / "out", "--count", "3", "--neighbours", "8")) == 0
    report = json.loads((tmp_path / "out/embeddings.json").read_text())
    ceiling = report["metrics"]["model"]["same ceiling"]
    assert 0 < ceiling <= 2 / 8  # two others at most have the joint
    assert f"no embedding reaches more than {ceiling:.4f}" in capsys.readouterr().out
    assert report["protocol"]["picture"]["method"] == "tsne"


def write_backbone(path: Path) -> None:
    backbone = build_backbone(SMALL)
    described = describe(
        stage="pretrain",
        method="mscl",
        model={"backbone": to_plain(SMALL), "input": to_plain(InputConfig())},
        skeleton=None,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, {f"backbone.{name}": value for name, value in backbone.state_dict().items()}, described)


@pytest.fixture(scope="module")
def mistaken(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistaken")
    write_model(root / "pose.safetensors", small_model())
    write_backbone(root / "backbone.safetensors")
    data = json.loads((people / "annotations.json").read_text())
    for person in data["annotations"]:
        person["keypoints"][2::3] = [min(v, 1) for v in person["keypoints"][2::3]]
    (root / "hidden.json").write_text(json.dumps(data))
    data["categories"][0]["keypoints"] = [f"point_{i}" for i in range(17)]
    (root / "other.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--checkpoints", "[]"], "checkpoints is empty"),
        (["--checkpoints", "[a, b, a]"], "checkpoints names a twice"),
        (["--checkpoints", "[nowhere.safetensors]"], "nowhere.safetensors: no such file"),
        (["--checkpoints", "[{root}/backbone.safetensors]"], "holds a backbone (stage pretrain), no pose model"),
        (["--annotations", "{root}/hidden.json"], "persons has a joint that is labelled visible (2)"),
        (["--annotations", "{root}/other.json"], "pose.safetensors: its joints (nose, left_eye, "),
        (["--annotations", "{root}/other.json"], "none in common with {root}/other.json (point_0, "),
        (["--count", "2", "--neighbours", "18"], "neighbours is 18, but some person is compared with only"),
        (["--count", "1"], "count is 1, expected at least 2"),
        (["--neighbours", "0"], "neighbours is 0, expected at least 1"),
        (["--method", "umap"], "method"),
    ],
)
def test_mistakes(
    people: Path,
    mistaken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    argv = asked(people, [str(mistaken / "pose.safetensors")], tmp_path / "out")
    given_fields = [word.replace("{root}", str(mistaken)) for word in more]
    assert main([*argv, *given_fields]) == 2
    message = capsys.readouterr().err
    assert expected.replace("{root}", str(mistaken)) in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_names_of_checkpoints_are_their_runs(tmp_path: Path) -> None:
    def path(folder: str) -> str:
        return str(tmp_path / folder / "export/model.safetensors")

    assert checkpoint_names([path("few"), path("icon")]) == ["few", "icon"]
    assert checkpoint_names([path("few/s0"), path("icon/s0")]) == ["few/s0", "icon/s0"]
    alike = [path("a/few/s0"), path("b/few/s0")]
    assert checkpoint_names(alike) == alike


def test_points_are_drawn_by_the_seed() -> None:
    assert np.array_equal(draw_points(2000, 0), np.arange(2000))
    drawn = draw_points(30000, 0)
    assert len(np.unique(drawn)) == 2000
    assert np.array_equal(drawn, draw_points(30000, 0))
    assert not np.array_equal(drawn, draw_points(30000, 1))
    assert abs(drawn.mean() - 15000) < 600  # three standard deviations of such a mean


def test_pca_is_the_singular_value_decomposition() -> None:
    vectors = torch.randn(40, 9, generator=seeded(0)) * torch.arange(9, 0, -1)
    xy, axes = lay_out(vectors, "pca", 0)
    centred = (vectors - vectors.mean(0)).double().numpy()
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(left[:, :2] * singular[:2]), atol=1e-8)
    shares = singular**2 / (singular**2).sum()
    assert axes == (f"1st component, {shares[0]:.0%} of the variance", f"2nd component, {shares[1]:.0%}")
    assert not lay_out(vectors[:1].expand(40, 9), "tsne", 0)[0].any()  # a collapsed network


def test_tsne_keeps_groups_together() -> None:
    joints = np.arange(100) % 4
    vectors = 5 * torch.eye(4, 60)[joints] + 0.1 * torch.randn(100, 60, generator=seeded(0))
    xy, _ = lay_out(vectors, "tsne", 0)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(100)
    assert (joints[distance.argsort(1)[:, :10]] == joints[:, None]).all()


@pytest.mark.parametrize("name", packaged_skeletons())
def test_no_two_joints_look_alike(name: str) -> None:
    skeleton = load_skeleton(name)
    styles = joint_styles(skeleton)
    assert len(set(styles)) == len(skeleton.joints)
    for joint, mirror in enumerate(skeleton.flip_index):
        assert styles[joint].colour == styles[mirror].colour


@pytest.mark.parametrize(("panels", "joints"), [(1, 3), (4, 23)])
def test_the_picture_is_whole(panels: int, joints: int) -> None:
    names = tuple(f"the_joint_of_the_body_number_{number}" for number in range(joints))
    rng = np.random.default_rng(0)
    shown = rng.integers(0, joints, 400)
    drawn = [Panel(f"{'run' * 15}\nand what was found of it", rng.normal(size=(400, 2)), ("", ""))] * panels
    figure = draw_panels(drawn, shown, Skeleton("many", names))
    offsets = [np.concatenate([c.get_offsets() for c in axes.collections]) for axes in figure.axes[:panels]]
    order = np.argsort(shown, kind="stable")
    assert all(np.array_equal(points, drawn[0].xy[order]) for points in offsets)
    assert len(figure.legends[0].get_texts()) == joints
    assert_nothing_is_cut_off(figure)


def assert_nothing_is_cut_off(figure: Figure) -> None:
    """Every text lies within the figure, and the legend covers no panel."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():  # pyright: ignore[reportAttributeAccessIssue]
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0, text
            assert box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0, text
            assert box.y1 <= figure.bbox.y1, text
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes if axes.axison)
