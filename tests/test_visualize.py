"""Grad-CAM against plain autograd and a case worked out by hand; what the figures show; what stops the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

from evaluation.__main__ import main
from evaluation.config import VisualizeConfig
from evaluation.gradcam import Classifier, explain, grad_cam, load_classifier
from evaluation.visualize import draw_gradcam, draw_losses, shortened
from poserelay.checkpoint import describe, write_export
from poserelay.config import InputConfig, Named
from poserelay.datasets.centre import centre_crop
from poserelay.datasets.sampling import read_image
from poserelay.model import build_backbone

SMALL = {"name": "timm", "kwargs": {"model": "test_resnet"}}
CPU = torch.device("cpu")


def write_classifier(
    path: Path, seed: int, *, method: str = "mscl", classes: tuple[str, ...] = ("cat", "dog", "owl"), size: int = 64
) -> Path:
    torch.manual_seed(seed)
    backbone = build_backbone(Named(**SMALL))
    head = nn.Linear(backbone.channels[-1], len(classes))
    with torch.no_grad():
        head.weight.add_(head.weight.abs().mean())  # more speaks for a class than against it
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {f"head.{name}": value for name, value in head.state_dict().items()}
    described = describe(
        stage="linear",
        method=method,
        model={
            "backbone": SMALL,
            "head": {"name": "linear", "kwargs": {"classes": list(classes)}},
            "input": {"height": size, "width": size, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
        },
        skeleton=None,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, weights, described)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classifiers and ten pictures."""
    root = tmp_path_factory.mktemp("visualize")
    write_classifier(root / "first/export/model.safetensors", 0)
    write_classifier(root / "second/export/model.safetensors", 1, method="simsiam", size=96)
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(10):
        picture = cv2.resize(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8), (100 + 9 * number, 110))
        cv2.imwrite(str(root / "pictures" / f"{number}.png"), picture)
    return root


def naive_heat(classifier: Classifier, crop: np.ndarray, index: int) -> Tensor:
    """Eq. 1 and 2 with loops, the gradient taken through one picture's own forward pass."""
    mean, std = torch.tensor(classifier.input.mean), torch.tensor(classifier.input.std)
    image = ((torch.from_numpy(crop).float() / 255 - mean) / std).permute(2, 0, 1)[None].requires_grad_()
    maps = classifier.backbone(image)[-1]
    maps.retain_grad()
    logits = classifier.head(maps.mean((2, 3)))
    logits[0, index].backward()
    assert maps.grad is not None
    _, channels, height, width = maps.shape
    heat = torch.zeros(height, width)
    for channel in range(channels):
        alpha = sum(float(maps.grad[0, channel, i, j]) for i in range(height) for j in range(width)) / (height * width)
        heat += alpha * maps[0, channel].detach()
    return heat.clamp(min=0)


@pytest.mark.parametrize("target", [None, "dog"])
def test_the_heat_is_plain_autograds(files: Path, target: str | None) -> None:
    classifier = load_classifier(files / "first/export/model.safetensors", CPU)
    assert classifier.input == InputConfig(64, 64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    images = [read_image(file) for file in sorted((files / "pictures").iterdir())[:4]]
    explained = explain(classifier, images, 2, target)  # the maps of 64 pixels are 2x2
    for row, image in enumerate(images):
        crop = centre_crop(image, 64)
        with torch.no_grad():
            logits = classifier.logits(classifier.backbone(normalised(classifier, crop))[-1])[0]
        index = int(logits.argmax()) if target is None else 1
        expected = naive_heat(classifier, crop, index)
        assert explained.classes[row] == classifier.classes[index]
        assert explained.probabilities[row] == pytest.approx(float(logits.softmax(0)[index]), abs=1e-5)
        torch.testing.assert_close(
            explained.heat[row], expected / expected.max().clamp(min=1e-30), rtol=1e-4, atol=1e-5
        )
    assert explained.heat.amax((1, 2)).tolist() == [1.0] * 4


def normalised(classifier: Classifier, crop: np.ndarray) -> Tensor:
    mean, std = torch.tensor(classifier.input.mean), torch.tensor(classifier.input.std)
    return ((torch.from_numpy(crop).float() / 255 - mean) / std).permute(2, 0, 1)[None]


def linear_head(weight: Tensor, bias: float = 0.0) -> Any:
    return lambda maps: maps.mean((2, 3)) @ weight.T + bias


def test_a_class_that_one_channel_speaks_for_is_that_channel() -> None:
    maps = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(2, 4)
    weight[1, 2] = 3.0
    heat = grad_cam(maps, linear_head(weight), torch.tensor([1, 1, 0]))
    torch.testing.assert_close(heat[:2], maps[:2, 2].clamp(min=0) * 3 / 30)
    assert heat[2].abs().max() == 0  # nothing speaks for class 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_what_does_not_change_the_heat(seed: int, factor: float, shift: float) -> None:
    """The scale of the logits (but for its own), their offset, the other pictures, and how the channels are ordered."""
    generator = torch.Generator().manual_seed(seed)
    maps, weight = torch.randn(4, 6, 3, 3, generator=generator), torch.randn(5, 6, generator=generator)
    classes = torch.randint(0, 5, (4,), generator=generator)
    heat = grad_cam(maps, linear_head(weight), classes)
    torch.testing.assert_close(grad_cam(maps, linear_head(factor * weight, shift), classes), factor * heat)
    alone = torch.cat([grad_cam(maps[i : i + 1], linear_head(weight), classes[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, heat)
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(grad_cam(maps[:, order], linear_head(weight[:, order]), classes), heat)
    torch.testing.assert_close(grad_cam(maps.flip(-1), linear_head(weight), classes), heat.flip(-1))


def test_a_nonlinear_classifier_has_its_own_gradient() -> None:
    maps = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    heat = grad_cam(
        maps, lambda a: torch.stack([a[:, 0].square().sum((1, 2)), a[:, 1].sum((1, 2))], 1), torch.tensor([0, 1])
    )
    torch.testing.assert_close(heat[0], 2 * maps[0, 0].mean() * maps[0, 0])
    torch.testing.assert_close(heat[1], maps[1, 1])


def test_nothing_that_speaks_for_a_class_is_no_heat(files: Path) -> None:
    classifier = load_classifier(files / "first/export/model.safetensors", CPU)
    with torch.no_grad():  # the maps end in a ReLU, so that with these weights everything speaks against
        classifier.head.weight.fill_(-1)
    picture = read_image(files / "pictures/0.png")
    assert explain(classifier, [picture], 32).heat.abs().max() == 0


def test_the_panel(files: Path) -> None:
    checkpoints = [str(files / f"{name}/export/model.safetensors") for name in ("first", "second")]
    config = VisualizeConfig("gradcam", "out", checkpoints, str(files / "pictures"), count=4, device="cpu")
    figure = draw_gradcam(config)
    cells = np.array(figure.axes[:12]).reshape(4, 3)
    assert [cell.get_title() for cell in cells[0]] == ["picture", "mscl", "simsiam"]
    assert [cell.get_xlabel() for cell in cells[:, 0]] == ["0.png", "3.png", "6.png", "9.png"]
    for row, name in enumerate(("0.png", "3.png", "6.png", "9.png")):
        image = read_image(files / "pictures" / name)
        for column, path in enumerate(checkpoints, start=1):
            picture, heat = cells[row, column].get_images()
            assert np.array_equal(picture.get_array(), centre_crop(image, 224))
            alone = explain(load_classifier(path, CPU), [image], 224)
            assert np.allclose(heat.get_array(), alone.heat[0], atol=1e-5)
            assert cells[row, column].get_xlabel() == f"{alone.classes[0]}  {alone.probabilities[0]:.0%}"
    assert_nothing_is_cut_off(figure)


def test_long_names_and_equal_methods_stay_readable(files: Path, tmp_path: Path) -> None:
    long = "a_class_with_a_name_that_nobody_could_ever_fit_under_a_picture"
    for name in ("run_with_quite_a_long_name_a", "run_with_quite_a_long_name_b"):
        write_classifier(tmp_path / name / "export/model.safetensors", 0, classes=(long, long + "2"))
    checkpoints = [str(path) for path in sorted(tmp_path.rglob("*.safetensors"))]
    figure = draw_gradcam(VisualizeConfig("gradcam", "out", checkpoints, str(files / "pictures/1.png"), device="cpu"))
    titles = [axes.get_title() for axes in figure.axes[1:3]]
    assert titles == ["mscl\nrun_with_...ng_name_a", "mscl\nrun_with_...ng_name_b"]
    assert_nothing_is_cut_off(figure)
    assert shortened("short") == "short"


def assert_nothing_is_cut_off(figure: Figure) -> None:
    """Every text lies within the figure, and no two overlap."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent() for text in texts]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(boxes) > 3
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0, texts[number]
        assert box.x1 <= figure.bbox.x1, texts[number]
        assert figure.bbox.y0 <= box.y0, texts[number]
        assert box.y1 <= figure.bbox.y1, texts[number]
        assert not any(box.overlaps(other) for other in boxes[:number]), texts[number]


def write_run(run: Path, rows: list[dict[str, Any]], *, epochs: int, total: int, method: str = "mscl") -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({"optim": {"epochs": epochs}, "method": {"name": method}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"attempt": 1, **row}) + "\n" for row in rows))
    (run / "status.json").write_text(json.dumps({"stage": "pretrain", "total": total}))
    return run


def rows_of(steps: list[int], levels: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "loss": -step / 100,
            **{f"loss_{level}": -step / (50 + n) for n, level in enumerate(levels)},
        }
        for step in steps
    ]


def test_the_losses_of_two_runs(tmp_path: Path) -> None:
    levels = ("conv2", "conv3", "conv4", "conv5")
    several = write_run(tmp_path / "with MS and FPN", rows_of([5, 10, 20, 40], levels), epochs=8, total=40)
    one = write_run(tmp_path / "baseline", rows_of([10, 30, 60], ("conv5",)), epochs=2, total=80)
    figure = draw_losses([several, one])
    total, each = figure.axes
    first, second = total.get_lines()
    assert (first.get_label(), second.get_label()) == ("with MS and FPN", "baseline")
    assert np.allclose(first.get_xdata(), [1, 2, 4, 8])  # 5 steps an epoch
    assert np.allclose(first.get_ydata(), [-0.05, -0.1, -0.2, -0.4])
    assert np.allclose(second.get_xdata(), [0.25, 0.75, 1.5])
    assert len(each.get_lines()) == 5
    for number, line in enumerate(each.get_lines()[:4]):
        assert np.allclose(line.get_ydata(), np.array([-5, -10, -20, -40]) / (50 + number))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(levels)
    # one level has one colour, whichever run it is of, and a run one style
    lines = each.get_lines()
    assert np.allclose(lines[3].get_color(), lines[4].get_color())
    assert lines[3].get_linestyle() != lines[4].get_linestyle()
    assert_nothing_is_cut_off(figure)
    for legend in figure.legends:
        others = [*figure.axes, *(other for other in figure.legends if other is not legend)]
        assert not any(legend.get_window_extent().overlaps(other.get_tightbbox()) for other in others)


def test_runs_of_one_loss_have_one_plot(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a/run", rows_of([1, 2], ("conv5",)), epochs=2, total=2)
    other = write_run(tmp_path / "b/run", rows_of([1, 2], ()), epochs=2, total=2)
    (axes,) = draw_losses([one, other]).axes
    assert [line.get_label() for line in axes.get_lines()] == ["a/run", "b/run"]


def test_the_command_writes_a_picture(files: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows_of([1, 2], ("conv4", "conv5")), epochs=2, total=2)
    assert main(["visualize", "--figure", "losses", "--runs", f"[{run}]", "--out", str(tmp_path / "out")]) == 0
    checkpoint = files / "first/export/model.safetensors"
    argv = [
        "--figure",
        "gradcam",
        "--checkpoints",
        f"[{checkpoint}]",
        "--images",
        str(files / "pictures"),
        "--count",
        "2",
    ]
    assert main(["visualize", *argv, "--out", str(tmp_path / "out"), "--target", "owl"]) == 0
    for name in ("losses.png", "gradcam.png"):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert picture is not None
        assert min(picture.shape[:2]) > 400
        assert picture.std() > 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gradcam.png", "losses.png"]


def test_a_file_without_a_classifier_says_how_to_train_one(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    described = describe(
        stage="pretrain",
        method="mscl",
        model={"backbone": SMALL, "input": {}},
        skeleton=None,
        config={},
        upstream=None,
        metrics={},
    )
    write_export(path, {}, described)
    argv = ["--figure", "gradcam", "--checkpoints", f"[{path}]", "--images", str(files / "pictures")]
    assert main(["visualize", *argv, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "holds no classifier (stage pretrain)" in message
    assert f"python -m pretrain linear --init_from {path}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--figure", "gradcam"], "checkpoints is missing"),
        (["--figure", "gradcam", "--checkpoints", "[{file}]"], "images is missing"),
        (["--figure", "losses"], "runs is missing"),
        (
            ["--figure", "losses", "--runs", "[x]", "--images", "y"],
            "images is of figure gradcam, quality, features, masked, search, side_by_side or errors; leave it out",
        ),
        (["--figure", "tsne"], "figure"),
        (["--figure", "losses", "--runs", "[nowhere]"], "nowhere/config.yaml: cannot be read"),
        (["--figure", "losses", "--runs", "[{root}/begun]"], "begun: no training loss over epochs"),
        (["--figure", "losses", "--runs", "[{root}/torn]"], "torn: status.json or metrics.jsonl is damaged"),
        (["--figure", "gradcam", "--checkpoints", "[{file}]", "--images", "nowhere"], "nowhere"),
        (
            ["--figure", "gradcam", "--checkpoints", "[{file}]", "--images", "{files}/pictures", "--count", "0"],
            "count is 0",
        ),
        (
            ["--figure", "gradcam", "--checkpoints", "[{file}]", "--images", "{files}/pictures", "--target", "cow"],
            "target 'cow' is not among the 3 classes",
        ),
        (["--figure", "gradcam", "--checkpoints", "[{file}]", "--images", "{root}"], "would draw among the pictures"),
        (["--figure", "gradcam", "--checkpoints", "[nowhere.pth]", "--images", "{files}/pictures"], "no such file"),
        (
            ["--figure", "gradcam", "--checkpoints", "[{file}]", "--images", "{root}/cut.png"],
            "not a picture, or damaged",
        ),
    ],
)
def test_mistakes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    write_run(tmp_path / "begun", [], epochs=2, total=0)
    write_run(tmp_path / "torn", rows_of([1], ()), epochs=2, total=2)
    (tmp_path / "torn/status.json").write_text("{")
    (tmp_path / "cut.png").write_bytes((files / "pictures/0.png").read_bytes()[:60])
    values = {"{file}": str(files / "first/export/model.safetensors"), "{files}": str(files), "{root}": str(tmp_path)}
    for name, value in values.items():
        more = [part.replace(name, value) for part in more]
    assert main(["visualize", *more, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
