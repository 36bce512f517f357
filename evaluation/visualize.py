"""`python -m evaluation visualize`: one figure. MSCL's are here: where classifiers look, how losses fall (Fig. 3, 4).

The others are drawn by `cir_figures`, `ccm_figures`, `search_figures`, `pose_figures`, `error_gallery`, and
`teacher_figures`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from poserelay.datasets.centre import centre_crop
from poserelay.datasets.sampling import read_image
from poserelay.datasets.unlabelled import list_images
from poserelay.distributed import start
from poserelay.errors import UserError
from poserelay.run import write_atomic

from .ccm_figures import draw_features, draw_masked
from .cir_figures import draw_quality, draw_scores
from .config import VisualizeConfig
from .curves import Curve, distinct_names, epochs_of, read_curve
from .error_gallery import draw_errors
from .gradcam import Explained, explain, load_classifier
from .pose_figures import draw_side_by_side
from .search_figures import draw_traces
from .teacher_figures import draw_teacher

# Pixels of a picture in the panel.
SIDE = 224
# Opacity of the heat over a picture; inferno rises evenly in lightness, so it reads without its colours too.
OPACITY, HEAT_COLOURS = 0.6, "inferno"
# Okabe and Ito's colours, which colour-blind readers tell apart, without those that levels have.
RUN_COLOURS = ("#000000", "#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00")
RUN_STYLES = ("solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def main(config: VisualizeConfig) -> Path:
    """Draw the figure into `out`, atomically; return its path. Raises UserError for input that cannot be used."""
    of_runs = {"losses": draw_losses, "teacher": draw_teacher}
    others = {
        "gradcam": draw_gradcam,
        "scores": draw_scores,
        "quality": draw_quality,
        "features": draw_features,
        "masked": draw_masked,
        "search": draw_traces,
        "side_by_side": draw_side_by_side,
        "errors": draw_errors,
    }
    if config.figure in of_runs:
        figure = of_runs[config.figure]([Path(run) for run in config.runs])
    else:
        figure = others[config.figure](config)
    path = Path(config.out) / f"{config.figure}.png"
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    print(f"{path} written", file=sys.stderr)
    return path


def draw_gradcam(config: VisualizeConfig) -> Figure:
    """Fig. 3: a row per picture, its central crop and the same under the heat of each checkpoint."""
    files = choose_pictures(config)
    device = start(config.device, "fp32", config.threads).device
    classifiers = [load_classifier(path, device) for path in config.checkpoints]
    images = [read_image(file, orientation="exif") for file in files]
    explained = [explain(classifier, images, SIDE, config.target) for classifier in classifiers]
    methods = [classifier.method for classifier in classifiers]
    runs = [
        f"{method}\n{shortened(run_name(path), 20)}" for method, path in zip(methods, config.checkpoints, strict=True)
    ]
    crops = [centre_crop(image, SIDE) for image in images]
    return draw_panel(crops, [file.name for file in files], explained, distinct_names(methods, runs))


def choose_pictures(config: VisualizeConfig) -> list[Path]:
    """`count` pictures evenly spread over the sorted ones, or the one that `images` is. Raises UserError."""
    images, out = Path(str(config.images)), Path(config.out)
    if not images.is_dir():
        return [images]
    if images.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: would draw among the pictures it reads ({images}); name a folder outside")
    files = list_images(images)
    return [files[row] for row in np.linspace(0, len(files) - 1, min(config.count, len(files))).round().astype(int)]


def run_name(path: str) -> str:
    """The run directory of RUN/export/model.safetensors, or else the file's own name."""
    file = Path(path).resolve()
    return file.parent.parent.name if file.parent.name == "export" else file.stem


def draw_panel(pictures: list[np.ndarray], names: list[str], explained: list[Explained], titles: list[str]) -> Figure:
    """Lay the pictures, uint8 RGB `[SIDE, SIDE, 3]`, out beside the heat of each checkpoint over them."""
    rows, columns = len(pictures), 1 + len(explained)
    figure = Figure(figsize=(1.7 * columns + 0.8, 1.85 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        axes[row, 0].imshow(picture)
        axes[row, 0].set_xlabel(shortened(name), fontsize=7)
        for column, one in enumerate(explained, start=1):
            cell = axes[row, column]
            cell.imshow(picture)
            cell.imshow(one.heat[row].numpy(), HEAT_COLOURS, alpha=OPACITY, vmin=0, vmax=1)
            cell.set_xlabel(f"{shortened(one.classes[row])}  {one.probabilities[row]:.0%}", fontsize=7)
    for column, title in enumerate(["picture", *titles]):
        axes[0, column].set_title(title, fontsize=8)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
    bar = figure.colorbar(ScalarMappable(cmap=HEAT_COLOURS), ax=axes, shrink=min(1.0, 2 / rows), aspect=25)
    bar.set_ticks([0, 1], labels=["none", "most"], fontsize=7)
    bar.set_label("evidence for the class", fontsize=7, labelpad=-8)
    return figure


def shortened(text: str, length: int = 24) -> str:
    """`text`, its middle left out where it is longer than a picture is wide."""
    half = length // 2 - 1
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def draw_losses(runs: list[Path]) -> Figure:
    """Fig. 4: the runs' total losses over epochs and, where a run has several, the losses of its levels."""
    curves = [read_curve(run) for run in runs]
    names = distinct_names([run.name for run in runs], [f"{run.parent.name}/{run.name}" for run in runs])
    epochs = [epochs_of(run, curve) for run, curve in zip(runs, curves, strict=True)]
    levels = level_names(curves)
    figure = Figure(figsize=(11 if levels else 5.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if levels else 1, squeeze=False)[0]
    colours = dict(zip(levels, matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(levels))), strict=True))
    for number, (curve, xs) in enumerate(zip(curves, epochs, strict=True)):
        style: Any = RUN_STYLES[number % len(RUN_STYLES)]
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        panels[0].plot(
            xs, curve.losses["loss"], color=colour, linestyle=style, linewidth=1.2, label=shortened(names[number], 48)
        )
        for level in [level for level in levels if level in curve.losses]:
            panels[1].plot(xs, curve.losses[level], color=colours[level], linestyle=style, linewidth=1.2)
    panels[0].set_title("total loss")
    handles = [Line2D([], [], color=colour, label=level.removeprefix("loss_")) for level, colour in colours.items()]
    if levels:
        panels[1].set_title("loss of each level")
        figure.legend(handles=handles, ncols=min(5, len(levels)), fontsize=9, loc="outside lower right")
    columns = max(1, min(3, 60 // max(map(len, names))))
    figure.legend(handles=panels[0].get_lines(), ncols=columns, fontsize=9, loc="outside lower left")
    for axes in panels:
        axes.set(xlabel="epochs", ylabel="training loss", xlim=(0, max(xs[-1] for xs in epochs)))
        axes.grid(alpha=0.3)
    return figure


def level_names(curves: list[Curve]) -> list[str]:
    """The terms of the losses that have more than one, in the order in which they first come."""
    several = [[name for name in curve.losses if name != "loss"] for curve in curves]
    return list(dict.fromkeys(name for names in several if len(names) > 1 for name in names))
