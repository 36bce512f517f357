"""Figures of persons, feature maps, searches, errors and teachers: what they show, by another way."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.nn import functional

from evaluation import ccm_figures, error_gallery, pose_figures, search_figures, teacher_figures
from evaluation.__main__ import main
from evaluation.config import VisualizeConfig
from evaluation.error_types import KINDS, ErrorTypes
from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, DistalJoints, InputConfig, ModelConfig, Named
from poserelay.datasets.coco import read_coco
from poserelay.geometry import apply_affine
from poserelay.heads.ccm import CCMHead
from poserelay.inference import predict_crops
from poserelay.keypoints import Skeleton, load_skeleton
from poserelay.model import PoseModel, build_model
from poserelay.scoring import scored_truth
from semi import teachers

COCO = load_skeleton("coco17")
SCIO = Named("scio", {"feature_channels": 4, "width": 4, "dilations": [1, 2], "sigma": 1.5})


def small_model(head: Named, *, refiner: Named | None = None, color: Any = "rgb") -> PoseModel:
    """Random weights, whose heatmaps have peaks all over."""
    torch.manual_seed(0)
    given = InputConfig(64, 64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), color)
    model = build_model(ModelConfig(Named("timm", {"model": "test_resnet"}), head, refiner, "coco17", given))
    for part in (model.head, model.refiner):
        for parameter in part.parameters() if part is not None else ():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def export(path: Path, model: PoseModel) -> Path:
    described = describe(
        stage="finetune",
        method="ccm",
        model=to_plain(model.config),
        skeleton=model.skeleton,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, model.state_dict(), described)
    return path


@pytest.fixture(scope="module")
def root(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and two results files of the rendered people: near the truth, and far with a pose left out."""
    folder = tmp_path_factory.mktemp("figures")
    export(folder / "ccm.safetensors", small_model(Named("ccm", {"channels": [8, 8], "auxiliary": False})))
    export(folder / "simple.safetensors", small_model(Named("simple", {"deconv_channels": [8, 8]}), color="bgr"))
    export(folder / "scio.safetensors", small_model(Named("simple", {"deconv_channels": [8, 8, 8]}), refiner=SCIO))
    data = json.loads((people / "annotations.json").read_text())
    rng = np.random.default_rng(0)
    for name, spread in (("near", 0.02), ("far", 0.1)):
        records = [noisy(person, spread, rng) for person in data["annotations"] if person["num_keypoints"]]
        (folder / name).mkdir()
        (folder / name / "predictions.json").write_text(json.dumps(records[1:] if name == "far" else records))
    return folder


def noisy(person: dict[str, Any], spread: float, rng: np.random.Generator) -> dict[str, Any]:
    triples = np.reshape(person["keypoints"], (-1, 3)).astype(float)
    triples[:, :2] += rng.normal(0, spread * person["bbox"][3], (len(triples), 2))
    triples[:, 2] = 1
    record = {"image_id": person["image_id"], "category_id": 1, "score": float(rng.random())}
    return {**record, "keypoints": triples.ravel().tolist()}


def asked(people: Path, figure: Any, **changes: Any) -> VisualizeConfig:
    given = {"annotations": str(people / "annotations.json"), "images": str(people / "images"), "device": "cpu"}
    return VisualizeConfig(figure, "out", **{**given, **changes})


def naive_oks(pose: Any, person: dict[str, Any], joints: Sequence[int] = range(17)) -> float:
    """By the definition, one joint after the other."""
    terms = []
    for joint in joints:
        x, y, v = person["keypoints"][3 * joint : 3 * joint + 3]
        if v > 0:
            squared = (pose[joint][0] - x) ** 2 + (pose[joint][1] - y) ** 2
            terms.append(np.exp(-squared / (2 * person["area"] * (2 * COCO.sigmas[joint]) ** 2)))
    return sum(terms) / len(terms) if terms else 0.0


def naive_owners(poses: list[dict[str, Any]], persons: list[dict[str, Any]]) -> dict[int, tuple[int, float]]:
    """Person to its pose and OKS: of all pairs the best first."""
    pairs = []
    for p, person in enumerate(persons):
        for r, record in enumerate(poses):
            if record["image_id"] == person["image_id"]:
                pairs.append((naive_oks(np.reshape(record["keypoints"], (-1, 3)), person), p, r))
    owners: dict[int, tuple[int, float]] = {}
    for value, p, r in sorted(pairs, reverse=True):
        if p not in owners and r not in {pose for pose, _ in owners.values()} and value > 0:
            owners[p] = (r, value)
    return owners


def persons_of(people: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    data = json.loads((people / "annotations.json").read_text())
    return data, [person for person in data["annotations"] if person["num_keypoints"]]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def test_two_models_side_by_side_with_the_oks_of_each(people: Path, root: Path) -> None:
    files = [str(root / name / "predictions.json") for name in ("near", "far")]
    data, persons = persons_of(people)
    found = [naive_owners(json.loads(Path(file).read_text()), persons) for file in files]
    values = np.array([[its.get(p, (-1, 0.0))[1] for p in range(len(persons))] for its in found])
    assert (values[1] == 0).any()  # the pose that was left out
    names = {image["id"]: image["file_name"] for image in data["images"]}

    def check(config: VisualizeConfig, order: np.ndarray) -> None:
        figure = pose_figures.draw_side_by_side(config)
        cells = np.array(figure.axes).reshape(-1, 3)
        for person, mine in zip(order.tolist(), cells, strict=True):
            assert mine[0].get_ylabel() == f"{names[persons[person]['image_id']]} #{persons[person]['id']}"
            for number, axes in enumerate(mine[1:]):
                said = f"OKS {values[number, person]:.2f}" if person in found[number] else "no pose: OKS 0"
                better = values[number, person] > values[1 - number, person]
                assert axes.get_title().split("\n")[-1] == said + (", best" if better else "")
        for axes, name, mean in zip(cells[0, 1:], ("near", "far"), values.mean(1), strict=True):
            assert axes.get_title().startswith(f"{name}\nmean OKS {mean:.3f}\n")

    config = asked(people, "side_by_side", predictions=files, count=3)
    labels = np.array([sum(v > 0 for v in person["keypoints"][2::3]) for person in persons])
    check(config, np.argsort(-np.abs(values[0] - values[1]) * labels, kind="stable")[:3])
    even = np.linspace(0, len(persons) - 1, 2).round().astype(int)
    check(asked(people, "side_by_side", predictions=files, count=2, choose="even"), even)


def test_a_pose_is_drawn_where_it_is(people: Path, root: Path) -> None:
    """The first cell holds the labels' pose: limbs and joints at the label places of the enlarged picture."""
    truth = scored_truth(read_coco(people / "annotations.json"), COCO)
    counted, row = truth.counted, truth.counted.persons[:1]
    labels = np.where(counted.visibility[row][..., None] > 0, counted.keypoints[row], np.nan)
    boxes = pose_figures.regions(counted.boxes[row], labels)
    view = pose_figures.views(counted, str(people / "images"), counted.image_index[row], boxes)[0]
    drawn = pose_figures.posed(view, labels[0], COCO)
    changed = (drawn != view.image).any(-1)
    seen = labels[0][~np.isnan(labels[0]).any(-1)]
    assert len(seen) > 5
    assert all(changed[y, x] for x, y in np.rint(apply_affine(view.affine, seen)).astype(int))
    assert 0.005 < changed.mean() < 0.3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), poses=st.integers(0, 8))
def test_whose_pose_it_is_agrees_with_a_loop_over_pairs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, poses: int
) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("crowd")
    persons: list[dict[str, Any]] = []
    for number in range(count):
        triples = np.column_stack([rng.uniform(0, 60, (17, 2)), rng.integers(0, 3, 17)])
        triples[0, 2] = 2
        triples[triples[:, 2] == 0, :2] = 0
        person = {"id": number + 1, "image_id": int(rng.integers(1, 3)), "category_id": 1, "iscrowd": 0}
        person |= {"bbox": [0, 0, 60, 60], "area": float(rng.uniform(500, 4000)), "num_keypoints": 1}
        persons.append({**person, "keypoints": triples.ravel().tolist()})
    results = [noisy(persons[int(rng.integers(count))], 0.15, rng) for _ in range(poses)]
    images = [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 60} for n in (1, 2)]
    category = {"id": 1, "name": "person", "keypoints": list(COCO.joints), "skeleton": []}
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": persons, "categories": [category]}))
    owned = pose_figures.own_poses("", scored_truth(read_coco(path), COCO), results, COCO)
    expected = naive_owners(results, persons)
    assert owned.pose.tolist() == [expected.get(p, (-1, 0))[0] for p in range(count)]
    assert np.allclose(owned.oks, [expected.get(p, (-1, 0))[1] for p in range(count)], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    box=st.tuples(st.floats(-50, 300), st.floats(-50, 300), st.floats(1, 200), st.floats(1, 200)),
    points=st.lists(st.tuples(st.floats(-900, 900), st.floats(-900, 900)), max_size=4),
)
def test_a_region_holds_the_box_and_the_points_that_are_near(box: Any, points: list[Any]) -> None:
    given = np.array([*points, (np.nan, np.nan)], dtype=float)[None]
    x, y, side, height = pose_figures.regions(np.array([box]), given)[0]
    assert side == pytest.approx(height)
    left, top, width, tall = box
    near = max(width, tall)
    centre = np.array([left + width / 2, top + tall / 2])
    wanted = [(left, top), (left + width, top + tall)]
    wanted += [point for point in points if (np.abs(np.array(point) - centre) <= near).all()]
    for px, py in wanted:
        assert x - 1e-6 <= px <= x + side + 1e-6
        assert y - 1e-6 <= py <= y + side + 1e-6
    assert side <= 2 * near + 1e-6


@pytest.mark.parametrize("side", [40.0, 320.0, 1000.0])
def test_an_enlarged_picture_shows_each_place_where_the_map_says(side: float) -> None:
    """A disc's centre of mass, to a twentieth of the coarser pixel, larger and smaller than it is drawn."""
    centre, radius = np.array([130.3, 220.6]) + side / 2, side / 5
    y, x = np.mgrid[:1400, :1400]
    away = radius - np.hypot(x - centre[0], y - centre[1])
    picture = np.repeat((255 * np.clip(away + 0.5, 0, 1)).astype(np.uint8)[..., None], 3, -1)
    affine = pose_figures.box_to_affine(np.array([130.0, 220.0, side, side]), (320, 320), padding=1.0)
    view = pose_figures.enlarged(picture, affine)[..., 0].astype(float)
    assert view.shape == (320, 320)
    rows, columns = np.mgrid[:320, :320]
    found = np.array([(view * columns).sum(), (view * rows).sum()]) / view.sum()
    assert np.allclose(found, apply_affine(affine, centre[None])[0], atol=0.05 * max(1, 320 / side))


def test_persons_of_a_single_label_do_not_come_first(people: Path) -> None:
    config = asked(people, "side_by_side", predictions=["a", "b"], count=2)
    found = np.array([[1.0, 0.5, 0.2], [0.0, 0.4, 0.2]])
    assert pose_figures.choose_persons(found, np.array([1, 17, 17]), config).tolist() == [1, 0]


def crops_of(model: PoseModel, people: Path, count: int) -> ccm_figures.Shown:
    annotations = read_coco(people / "annotations.json")
    config = asked(people, "features", checkpoints=["x"], count=count)
    return ccm_figures.shown_persons(model, annotations, annotations.persons, config)


@pytest.mark.parametrize(("se", "hdc"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_feature_maps_are_the_mixers_own(people: Path, se: bool, hdc: bool) -> None:
    """Eq. 1 to 4 written out."""
    model = small_model(Named("ccm", {"channels": [8, 8], "auxiliary": False, "se": se, "hdc": hdc}))
    images = model.preprocess(crops_of(model, people, 2).batch.images)
    with ccm_figures.listening(model) as heard, torch.inference_mode():
        model(images)
    found = {(its.level, its.name): its.maps for its in ccm_figures.feature_maps(model, heard)}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert isinstance(model.head, CCMHead)
    mixers: Any = model.head.mixers
    context = {(True, True): "HDC x SE", (True, False): "SE", (False, True): "HDC"}.get((se, hdc))
    names = [f"HDC {k}" for k in range(1, 5) if hdc] + [context] * (context is not None) + ["Deconv"]
    assert list(found) == [(level, name) for level in (1, 2) for name in names]
    with torch.inference_mode():
        x = model.backbone(images)[-1]
        for level, mixer in enumerate(mixers, start=1):
            dilated = [torch.relu(norm(conv(x))) for conv, norm, _ in mixer.dilated]
            for k, expected in enumerate(dilated, start=1):
                torch.testing.assert_close(found[level, f"HDC {k}"], expected)
            term = mixer.deconv_norm(mixer.deconv(torch.cat(dilated, 1) if hdc else x))
            if se:
                pooled = x.mean((2, 3), keepdim=True)
                term = term * torch.sigmoid(mixer.se[3](torch.relu(mixer.se[1](pooled))))
            if context is not None:
                torch.testing.assert_close(found[level, context], term)
                larger = functional.interpolate(mixer.residual(x), scale_factor=2, mode="bilinear")
                term = term + mixer.residual_norm(larger)
            x = torch.relu(term)
            torch.testing.assert_close(found[level, "Deconv"], x)


def test_the_features_figure_shows_the_maps_over_the_crops(people: Path, root: Path) -> None:
    config = asked(people, "features", checkpoints=[str(root / "ccm.safetensors")], count=1)
    figure = ccm_figures.draw_features(config)
    cells = np.array(figure.axes[:14]).reshape(2, 7)
    assert [axes.get_title() for axes in cells[0]] == ["pose", "HDC 1", "HDC 2", "HDC 3", "HDC 4", "HDC x SE", "Deconv"]
    assert [axes.get_ylabel() for axes in cells[:, 1]] == ["level 1, 2x2 to 4x4", "level 2, 4x4 to 8x8"]
    model, annotations = ccm_figures.open_model(config)
    shown = ccm_figures.shown_persons(model, annotations, annotations.persons, config)
    with torch.inference_mode():
        features = model.with_features(model.preprocess(shown.batch.images))[1]
    heat = features[0].abs().mean(0)
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    crop = ccm_figures.enlarged_crops(shown.batch.images)[0]
    shown_map = cells[1, 6].get_images()[0].get_array()
    assert np.abs(np.asarray(shown_map, float) - ccm_figures.overlaid(crop, heat.numpy()).astype(float)).max() <= 1

    simple = asked(people, "features", checkpoints=[str(root / "simple.safetensors")], count=2)
    assert titles(ccm_figures.draw_features(simple))[:3] == ["pose", "last map", "heatmaps"]


def test_the_heat_is_bright_where_the_map_is_high() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 1
    drawn = ccm_figures.overlaid(np.full((64, 64, 3), 100, np.uint8), heat).sum(-1)
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (y // 16, x // 16) == (1, 2)
    assert drawn[60, 5] == drawn.min()


def test_what_is_hidden_is_hidden(people: Path) -> None:
    """Discs by their definition; halves by a loop over pixels; the colour is the network's 0, whatever its order."""
    for model in (small_model(Named("simple", {})), small_model(Named("simple", {}), color="bgr")):
        shown = crops_of(model, people, 4)
        labels, inside = ccm_figures.labels_in_crops(shown.dataset)
        joints = COCO.indices(("left_wrist", "nose"))
        disc = ccm_figures.hide("left_wrist+nose", ccm_figures.hidden_joints("left_wrist+nose", COCO), shown)
        assert disc.joints == joints
        lower = ccm_figures.hide("lower", ccm_figures.hidden_joints("lower", COCO), shown)
        assert {COCO.joints[j] for j in lower.joints} == set(COCO.joints) - set(COCO.upper_body)
        rng = np.random.default_rng(0)
        for person in range(4):
            for y, x in rng.integers(0, 64, (60, 2)).tolist():
                far = [np.hypot(*(labels[person, j] - (x, y))) if inside[person, j] else np.inf for j in range(17)]
                assert disc.masks[person, y, x] == (min(far[j] for j in joints) <= 6.4)
                assert lower.masks[person, y, x] == (int(np.argmin(far)) in lower.joints)
            for joint in joints:
                if inside[person, joint]:
                    x, y = np.rint(labels[person, joint]).astype(int)
                    assert disc.masks[person, y, x]
        painted = ccm_figures.painted(shown, disc.masks).images
        masked = torch.from_numpy(disc.masks)[:, None].expand_as(painted)
        assert torch.equal(painted[~masked], shown.batch.images[~masked])
        assert model.preprocess(painted)[masked].abs().max() < 0.02


def test_the_masked_figure_tells_what_hiding_does(people: Path, root: Path) -> None:
    path = str(root / "simple.safetensors")
    config = asked(people, "masked", checkpoints=[path], count=2, hide=["left_elbow", "lower"])
    figure = ccm_figures.draw_masked(config)
    cells = np.array(figure.axes).reshape(2, 5)
    assert cells[0, 1].get_title().startswith("left elbow hidden\nOKS ")
    model, annotations = ccm_figures.open_model(config)
    joints = {name: ccm_figures.hidden_joints(name, COCO) for name in config.hide}
    everyone = ccm_figures.annotated_crops(model, annotations, str(people / "images"))
    rows = annotations.persons[ccm_figures.persons_to_hide(everyone, joints)]
    shown = ccm_figures.shown_persons(model, annotations, rows, config)
    records = {person["id"]: person for person in persons_of(people)[1]}
    before = predict_crops(model, shown.batch, Decoding())
    for number, name in enumerate(config.hide):
        batch = ccm_figures.painted(shown, ccm_figures.hide(name, joints[name], shown).masks)
        now = predict_crops(model, batch, Decoding())
        for row, person in enumerate(shown.batch.annotation_ids):
            assert person is not None
            poses = [found.keypoints[row].double().numpy() for found in (before, now)]
            scores = [float(found.scores[row, list(joints[name])].mean()) for found in (before, now)]
            assert cells[row, 0].get_title().split("\n")[-1] == f"OKS {naive_oks(poses[0], records[person]):.2f}"
            posed, warm = cells[row, 1 + 2 * number], cells[row, 2 + 2 * number]
            assert posed.get_title().split("\n")[-1] == f"OKS {naive_oks(poses[1], records[person]):.2f}"
            fits = [naive_oks(pose, records[person], joints[name]) for pose in poses]
            told = [f"OKS {fits[0]:.2f} to {fits[1]:.2f}", f"score {scores[0]:.2f} to {scores[1]:.2f}"]
            assert warm.get_title().split("\n")[-2:] == told


@pytest.mark.parametrize("flip", [False, True])
def test_the_path_is_the_search_of_test(people: Path, root: Path, flip: bool) -> None:
    """It ends where decoding puts the distal joints, and the landscape's middle is the loss where it starts."""
    model, annotations = ccm_figures.open_model(asked(people, "search", checkpoints=[str(root / "scio.safetensors")]))
    shown = ccm_figures.shown_persons(
        model, annotations, annotations.persons, asked(people, "search", checkpoints=["x"], count=2)
    )
    decoding = Decoding(flip=flip, scio=DistalJoints(proximal_threshold=-1e9, steps=8))
    traces = search_figures.trace(shown, decoding)
    assert traces.confident.all()
    decoded = predict_crops(model, shown.batch, decoding).keypoints.double().numpy()
    distal = [COCO.indices([group.distal])[0] for group in COCO.groups]
    ends = traces.to_image(traces.search.positions[-1])
    assert np.allclose(ends, decoded[:, distal], atol=2e-3)
    assert (traces.search.positions[-1] != traces.search.positions[0]).any()
    middle = search_figures.GRID // 2
    assert np.allclose(traces.landscape[middle, middle], traces.search.losses[0].numpy(), rtol=1e-4)
    # one step along x, from the start, where a step is taken first
    assert np.isnan(traces.landscape).any()
    positions = traces.search.positions.double()
    for person in range(2):
        for group in range(len(distal)):
            x, y = positions[0, person, group].tolist()
            off = [x + traces.offsets < 0, x + traces.offsets > 15, y + traces.offsets < 0, y + traces.offsets > 15]
            expected = (off[0] | off[1])[None] | (off[2] | off[3])[:, None]
            assert np.array_equal(np.isnan(traces.landscape[..., person, group]), expected)


def test_the_search_figure_marks_start_end_and_truth(people: Path, root: Path) -> None:
    decoding = Decoding(scio=DistalJoints(proximal_threshold=-1e9, steps=8))
    config = asked(people, "search", checkpoints=[str(root / "scio.safetensors")], count=1, decoding=decoding)
    figure = search_figures.draw_traces(config)
    on_crop, landscape, by_step = figure.axes[:3]
    lines = {str(line.get_label()): np.array(line.get_xydata()) for line in landscape.get_lines()}
    assert np.allclose(lines["start"][0], lines["path"][0])
    assert np.allclose(lines["end"][0], lines["path"][-1])
    off = [np.linalg.norm(lines[name][0] - lines["truth"][0]) for name in ("start", "end")]
    assert landscape.get_title() == f"{off[0]:.1f} to {off[1]:.1f} heatmap pixels off"
    losses = np.array(by_step.get_lines()[0].get_ydata())
    assert len(losses) == 9
    assert (np.diff(losses) <= 0).all()
    # the same places on the crop: of 64 pixels, enlarged to 256, four to a heatmap pixel
    drawn = {str(line.get_label()): np.array(line.get_xydata()) for line in on_crop.get_lines()}
    for name in ("path", "truth"):
        assert np.allclose(drawn[name], (lines[name] * 4 + 0.5) * 4 - 0.5, atol=0.05)


def write_run(run: Path, teacher: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({"teacher": teacher}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"attempt": 1, **row}) + "\n" for row in rows))
    return run


def lesson_rows(factor: float, **more: float) -> list[dict[str, Any]]:
    names = ("supervised", "unlabelled", "kept", "agreement", "labelled_peak", "peak_q10", "peak_q50", "peak_q90")
    return [
        {"kind": "train", "step": step} | {name: factor * (n + 1) / step for n, name in enumerate(names)} | more
        for step in (10, 20, 30)
    ]


def test_the_curves_of_teachers_are_the_logged_ones(tmp_path: Path) -> None:
    validated = {"kind": "validation", "step": 30, "AP": 0.4, "mean AP": 0.35}
    rows = [*lesson_rows(0.5, skcc=4.0), validated]
    first = write_run(tmp_path / "pseudo", {"name": "pseudo", "kwargs": {}}, rows)
    second = write_run(tmp_path / "mean", {"name": "mean", "kwargs": {"gamma": 0.3}}, lesson_rows(1.0)[:2])
    third = write_run(tmp_path / "dual", {"name": "dual", "kwargs": {}}, lesson_rows(0.2))
    figure = teacher_figures.draw_teacher([first, second, third])
    shares, peaks, losses, contrast, precision = figure.axes[:5]

    def line(axes: Any, name: str, place: int) -> np.ndarray:
        return np.array([its for its in axes.get_lines() if its.get_gid() == name][place].get_xydata())

    assert np.allclose(line(shares, "kept", 0), [[10, 0.15], [20, 0.075], [30, 0.05]])
    assert np.allclose(line(shares, "agreement", 1), [[10, 0.4], [20, 0.2]])
    assert np.allclose(line(peaks, "peak_q50", 2), [[10, 0.14], [20, 0.07], [30, 0.2 * 7 / 30]])
    assert np.allclose(line(losses, "unlabelled", 1), [[10, 0.2], [20, 0.1]])
    assert np.allclose(line(contrast, "skcc", 0)[:, 1], 4)
    assert np.allclose(line(precision, "mean AP", 0), [[30, 0.35]])
    gammas = [np.asarray(its.get_ydata())[0] for its in peaks.get_lines() if its.get_gid() == "gamma"]
    assert gammas == [0.75, 0.3]
    for runs, taught in (([first, third], True), ([third], False)):
        legend = teacher_figures.draw_teacher(runs).axes[1].get_legend()
        assert legend is not None
        assert ("taught above" in [text.get_text() for text in legend.get_texts()]) == taught
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "pseudo (pseudo)",
        "mean (mean)",
        "dual (dual)",
    ]


def test_the_thresholds_that_a_config_leaves_out_are_those_of_semi() -> None:
    of_semi = {
        name: inspect.signature(build).parameters["gamma"].default
        for name, build in teachers.TEACHERS.items()
        if "gamma" in inspect.signature(build).parameters
    }
    assert {name for name in of_semi if of_semi[name]} == set(teacher_figures.DEFAULT_GAMMA)
    assert all(of_semi[name] == gamma for name, gamma in teacher_figures.DEFAULT_GAMMA.items())


def test_the_worst_persons_are_those_that_lose_most(people: Path, root: Path) -> None:
    truth = scored_truth(read_coco(people / "annotations.json"), COCO)
    results = json.loads((root / "near/predictions.json").read_text())
    joints = np.where(truth.counted.visibility[truth.counted.persons] > 0, 0, -1).astype(np.int8)
    oks = np.linspace(0.9, 0.2, len(joints))
    persons = np.arange(len(joints))
    confused = np.full(joints.shape, -1)
    errors = ErrorTypes(persons, persons, oks, joints, confused)
    worst = error_gallery.worst_poses(truth, results, COCO, errors, 3)
    lost = [(1 - value) * sum(kind >= 0 for kind in row) for value, row in zip(oks, joints.tolist(), strict=True)]
    order = sorted(range(len(lost)), key=lambda row: -lost[row])[:3]
    assert [its.oks for its in worst] == [oks[row] for row in order]
    assert [its.name.split("#")[1] for its in worst] == [
        str(truth.counted.ids[truth.counted.persons[r]]) for r in order
    ]


def test_the_kinds_of_errors_are_named_and_marked_at_their_joints(people: Path) -> None:
    truth = scored_truth(read_coco(people / "annotations.json"), COCO)
    person = truth.counted.persons[0]
    labels = truth.counted.keypoints[person]
    kinds, confused = np.zeros(17, np.int8), np.full(17, -1)
    for joint, kind, at in ((5, "jitter", -1), (9, "inversion", 10), (10, "swap", 16), (13, "miss", -1)):
        kinds[joint], confused[joint] = KINDS.index(kind), at
    kinds[0] = -1
    row = int(truth.counted.image_index[person])
    box = truth.counted.boxes[person]
    worst = error_gallery.WorstPose("a.png #7", row, box, labels, labels + 3, kinds, confused, 0.456, 0.8)
    assert error_gallery.described(worst, COCO.joints) == [
        "jitter: left shoulder",
        "inversion: left wrist at its right",
        "   wrist",
        "miss: left knee",
        "swap: right wrist at another's right",
        "   ankle",
        "good: 12 of 16 labelled joints",
    ]
    view = error_gallery.worst_views([worst], truth, str(people / "images"))[0]
    figure = Figure()
    cells = list(figure.subplots(1, 3))
    error_gallery.show_worst(cells, worst, view, COCO.joints, COCO)
    assert cells[1].get_title() == "OKS 0.46, score 0.80"
    assert cells[0].get_xlabel() == "a.png #7"
    marks = {
        str(line.get_gid()): np.array(line.get_xydata())[0]
        for line in cells[1].get_lines()
        if line.get_gid() in COCO.joints
    }
    assert set(marks) == {"left_shoulder", "left_wrist", "right_wrist", "left_knee"}
    for name, place in marks.items():
        joint = COCO.joints.index(name)
        assert np.allclose(place, apply_affine(view.affine, worst.keypoints[joint : joint + 1])[0])
    picture = error_gallery.draw_worst(worst, truth, str(people / "images"), COCO)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.std() > 5


def test_the_command_writes_each_figure(
    people: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--annotations", f"{people}/annotations.json", "--images", f"{people}/images", "--count", "1"]
    both = f"[{root}/near/predictions.json, {root}/far/predictions.json]"
    ccm, scio = (["--checkpoints", f"[{root}/{name}.safetensors]"] for name in ("ccm", "scio"))
    run = write_run(tmp_path / "run", {"name": "mean", "kwargs": {}}, lesson_rows(0.5))
    figures = {
        "errors": [*given, "--predictions", f"[{root}/far/predictions.json]"],
        "side_by_side": [*given, "--predictions", both, "--choose", "even"],
        "features": [*given, *ccm],
        "masked": [*given, *ccm, "--hide", "[left_knee]"],
        "search": [*given, *scio, "--decoding.scio", "{steps: 1, radius: 0, proximal_threshold: -9}"],
        "teacher": ["--runs", f"[{run}]"],
    }
    for name, argv in figures.items():
        assert main(["visualize", "--figure", name, *argv, "--out", str(tmp_path)]) == 0
        if name == "errors":
            picture = cv2.imread(str(tmp_path / f"{name}.png"))
            assert picture is not None
            assert min(picture.shape[:2]) > 200
            assert picture.std() > 5
            # drawing pixels takes seconds, and one is like the other
            monkeypatch.setattr(Figure, "savefig", lambda its, path, **_: path.write_text(str(len(its.axes))))
        else:
            assert int((tmp_path / f"{name}.png").read_text()) >= 3


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["features"], "figure features: checkpoints is missing"),
        (["features", "{ccm}", "{data}", "--hide", "[nose]"], "hide is of figure masked; leave it out"),
        (["features", "--checkpoints", "[a, b]", "{data}"], "checkpoints names 2 files, expected one"),
        (["features", "{ccm}", "{data}", "--choose", "even"], "choose is of figure side_by_side; leave it out"),
        (
            ["errors", "{near}", "{data}", "--decoding.flip", "false"],
            "decoding is of figure features, masked or search",
        ),
        (["masked", "{ccm}", "{data}"], "figure masked: hide is missing"),
        (["masked", "{ccm}", "{data}", "--hide", "[nose, nose]"], "hide names nose twice"),
        (["masked", "{ccm}", "{data}", "--hide", "[left_wirst]"], "hide left_wirst: skeleton 'coco17': unknown joint"),
        (
            ["masked", "--checkpoints", "[{root}/plain.safetensors]", "{data}", "--hide", "[upper]"],
            "the upper_body; name",
        ),
        (["search", "{ccm}", "{data}"], "carries no SCIO networks, so nothing is searched"),
        (["side_by_side", "{near}", "{data}"], "predictions names 1 file, expected two or more"),
        (["errors", "{both}", "{data}"], "predictions names 2 files, expected one"),
        (["errors", "--predictions", "[{root}/none.json]", "{data}"], "no pose has an OKS of 0.1 with any person"),
        (["teacher", "--runs", "[{root}]"], "config.yaml: cannot be read"),
        (["teacher", "--runs", "[{root}/alone]"], "a run without a teacher"),
        (["teacher", "--runs", "[{root}/begun]"], "has not logged what its teacher does"),
        (["side_by_side", "{both}", "{truth}", "--images", "{root}"], "image"),
    ],
)
def test_mistakes(
    people: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    if not (root / "none.json").exists():
        (root / "none.json").write_text("[]")
        write_run(root / "alone", {"name": "none", "kwargs": {}}, lesson_rows(1.0))
        write_run(root / "begun", {"name": "mean", "kwargs": {}}, [])
        plain = small_model(Named("simple", {"deconv_channels": [8, 8]}))
        plain.skeleton = Skeleton(name="plain", joints=COCO.joints)
        export(root / "plain.safetensors", plain)
    truth = ["--annotations", f"{people}/annotations.json"]
    both = f"[{root}/near/predictions.json, {root}/far/predictions.json]"
    parts = {
        "{ccm}": ["--checkpoints", f"[{root}/ccm.safetensors]"],
        "{truth}": truth,
        "{data}": [*truth, "--images", f"{people}/images"],
        "{near}": ["--predictions", f"[{root}/near/predictions.json]"],
        "{both}": ["--predictions", both],
    }
    argv = [text.replace("{root}", str(root)) for part in more for text in parts.get(part, [part])]
    assert main(["visualize", "--figure", *argv, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
