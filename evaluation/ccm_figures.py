"""CCM's figures (Zhang, Chen and Tao): feature maps of the context mixers (Fig. 12), joints and halves of the body
painted over (Fig. 13 and 14)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from textwrap import wrap
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor, nn

from poserelay.batch import CropBatch
from poserelay.checkpoint import verify_handoff
from poserelay.datasets.coco import CocoAnnotations, read_coco, read_json
from poserelay.datasets.sampling import evenly
from poserelay.datasets.topdown import TopDownDataset, collate
from poserelay.distributed import start
from poserelay.drawing import draw_poses
from poserelay.errors import UserError
from poserelay.geometry import apply_affine, box_to_affine
from poserelay.heads.ccm import CCMHead, ContextMixer
from poserelay.inference import decode_crops, forward_crops, predict_crops
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel, load_top_down
from poserelay.oks import oks_of_pairs

from .cir_figures import short_name
from .config import VisualizeConfig
from .joint_accuracy import oks_areas
from .pose_figures import show
from .reliance import annotated_crops

HEIGHT = 256
"""Pixels of an enlarged crop's longer side."""
COLOURS, OPACITY = "inferno", 0.6
"""Of the heat over a crop; inferno rises evenly in lightness."""
RADIUS = 0.1
"""Of the disc over a hidden joint, of the crop's longer side."""
HALVES = ("upper", "lower")


class Shown(NamedTuple):
    """B persons' crops as a model sees them."""

    model: PoseModel
    batch: CropBatch
    """On the model's device."""
    dataset: TopDownDataset
    """The B persons alone."""
    areas: np.ndarray
    """`[B]` image pixels squared, that OKS takes."""


class FeatureMap(NamedTuple):
    """What a layer makes of B crops."""

    level: int
    """Of its context mixer, from 1."""
    name: str
    maps: Tensor
    """`[B, C, h, w]`, on the CPU."""


class Hidden(NamedTuple):
    """What is painted over."""

    name: str
    joints: tuple[int, ...]
    """Of the model's skeleton."""
    masks: np.ndarray
    """`[B, H, W]` bool, input pixels."""


def draw_features(config: VisualizeConfig) -> Figure:
    """Fig. 12: for each person a row per context mixer: its dilated convolutions, the first term of Eq. 4, its output.

    Of other heads the one map that the last layer reads. A map is the mean of its channels' absolute values, each map
    from its least (dark) to its greatest (bright). Beside them the pose, and the greatest of the heatmaps. Raises
    UserError and UnreadableImage.
    """
    model, annotations = open_model(config)
    shown = shown_persons(model, annotations, annotations.persons, config)
    with listening(model) as heard, torch.inference_mode():
        heatmaps = model(model.preprocess(shown.batch.images)).float().cpu()
    poses = predict_crops(model, shown.batch, config.decoding)
    found = feature_maps(model, heard)
    levels = max(its.level for its in found)
    names = list(dict.fromkeys(its.name for its in found))
    blocks = 2 if len(shown.batch) > 2 else 1  # persons beside each other
    across = 1 + len(names) + (levels == 1)
    down = levels * -(-len(shown.batch) // blocks)
    aspect = model.input.height / model.input.width
    figure = Figure(figsize=(1.4 * across * blocks + 0.6, 1.42 * aspect * down + 0.9), layout="constrained")
    cells = figure.subplots(down, across * blocks, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    head = model.config.head.name if model.config.head is not None else ""
    for person, crop in enumerate(enlarged_crops(shown.batch.images)):
        row, column = levels * (person // blocks), across * (person % blocks)
        mine = cells[row : row + levels, column : column + across]
        titled = row == 0
        keypoints = in_enlarged(shown, poses.keypoints.double().numpy(), crop)[person]
        posed = draw_poses(crop, keypoints[None], poses.scores[person : person + 1].numpy(), model.skeleton)
        framed(mine[0, 0], posed, "pose" if titled else "")
        name = shown.dataset.annotations.file_names[shown.dataset.image_index[person]]
        mine[0, 0].set_ylabel(short_name(name, 22), fontsize=8)
        for its in found:
            axes = mine[its.level - 1, 1 + names.index(its.name)]
            heat = spread(its.maps[person].abs().mean(0).numpy())
            framed(axes, overlaid(crop, heat), its.name if titled and its.level == 1 else "")
        for level in range(1, levels + 1) if levels > 1 else ():
            sizes = ["x".join(map(str, its.maps.shape[-2:])) for its in found if its.level == level]
            mine[level - 1, 1].set_ylabel(f"level {level}, {' to '.join(dict.fromkeys(sizes))}", fontsize=8)
        strongest = spread(heatmaps[person].amax(0).numpy())
        # under the pose, where the cascade ends
        place = mine[0, -1] if levels == 1 else mine[-1, 0]
        framed(place, overlaid(crop, strongest), "heatmaps" if titled and levels == 1 else "")
        if levels > 1:
            place.set_ylabel("heatmaps", fontsize=8)
    bar = figure.colorbar(ScalarMappable(cmap=COLOURS), ax=cells, location="bottom", shrink=0.4, aspect=40, pad=0.01)
    bar.set_ticks([0, 1], labels=["least", "most"], fontsize=9)
    bar.set_label(f"of each map, mean of its channels' absolute values (head {head})", fontsize=9)
    return figure


def draw_masked(config: VisualizeConfig) -> Figure:
    """Fig. 13 and 14: each person's pose as the crop is, and with each of `hide` painted over in the mean colour.

    Beside each the greatest of the hidden joints' heatmaps, from its least to its most. Above: the pose's OKS, and of
    the hidden joints the OKS and the mean score before and now. A joint is hidden by a disc of a tenth of the
    crop's longer side; half the body by painting every pixel whose nearest labelled joint is of that half. Raises
    UserError and UnreadableImage.
    """
    model, annotations = open_model(config)
    joints = {name: hidden_joints(name, model.skeleton) for name in config.hide}
    candidates = persons_to_hide(annotated_crops(model, annotations, str(config.images)), joints)
    if not candidates.any():
        raise UserError(
            f"{config.annotations}: no person has all of {', '.join(config.hide)} labelled in its crop (of a half two "
            "joints, and two of the other); hide less, or take another file"
        )
    shown = shown_persons(model, annotations, annotations.persons[candidates], config)
    hidden = [hide(name, its, shown) for name, its in joints.items()]
    before = predict_crops(model, shown.batch, config.decoding)
    rows, columns = len(shown.batch), 1 + 2 * len(hidden)
    aspect = model.input.height / model.input.width
    figure = Figure(figsize=(1.75 * columns + 0.3, (1.75 * aspect + 0.62) * rows + 0.5), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)

    crops = enlarged_crops(shown.batch.images)
    whole = fits(shown, before.keypoints, range(len(model.skeleton.joints)))
    places = in_enlarged(shown, before.keypoints.double().numpy(), crops[0])
    for row in range(rows):
        drawn = draw_poses(crops[row], places[row][None], before.scores[row : row + 1].numpy(), model.skeleton)
        show(cells[row, 0], drawn)
        title = f"OKS {whole[row]:.2f}"
        cells[row, 0].set_title(f"as it is\n{title}" if row == 0 else title, fontsize=9)
        name = shown.dataset.annotations.file_names[shown.dataset.image_index[row]]
        cells[row, 0].set_ylabel(short_name(name, 26), fontsize=8)
    for number, its in enumerate(hidden):
        batch = painted(shown, its.masks)
        maps = forward_crops(model, batch, config.decoding)
        now = decode_crops(model, batch, maps, config.decoding)
        masked_crops = enlarged_crops(batch.images)
        places = in_enlarged(shown, now.keypoints.double().numpy(), crops[0])
        everything = fits(shown, now.keypoints, range(len(model.skeleton.joints)))
        its_fit = (fits(shown, before.keypoints, its.joints), fits(shown, now.keypoints, its.joints))
        its_score = [found.scores[:, list(its.joints)].mean(1).tolist() for found in (before, now)]
        heat = maps.maps[:, list(its.joints)].amax(1).cpu().numpy()
        for row in range(rows):
            posed, warm = cells[row, 1 + 2 * number], cells[row, 2 + 2 * number]
            scores = now.scores[row : row + 1].numpy()
            show(posed, draw_poses(masked_crops[row], places[row][None], scores, model.skeleton))
            show(warm, overlaid(masked_crops[row], spread(heat[row])))
            title = f"OKS {everything[row]:.2f}"
            heading = "\n".join(wrap(f"{its.name} hidden", 26))
            posed.set_title(f"{heading}\n{title}" if row == 0 else title, fontsize=9)
            told = f"OKS {its_fit[0][row]:.2f} to {its_fit[1][row]:.2f}"
            told += f"\nscore {its_score[0][row]:.2f} to {its_score[1][row]:.2f}"
            warm.set_title(f"hidden joints\n{told}" if row == 0 else told, fontsize=9)
    figure.supxlabel(
        "above a pose: OKS of all labelled joints; above heatmaps: of the hidden ones alone, before to now; "
        "joints scored under 0.2 are not drawn",
        fontsize=9,
    )
    return figure


def open_model(config: VisualizeConfig) -> tuple[PoseModel, CocoAnnotations]:
    """The checkpoint on its device, and the file with the truth. Raises UserError."""
    verify_handoff(config.checkpoints[0])
    model = load_top_down(config.checkpoints[0])
    annotations = read_coco(str(config.annotations))
    return model.to(start(config.device, "fp32", config.threads).device), annotations


def shown_persons(
    model: PoseModel, annotations: CocoAnnotations, candidates: np.ndarray, config: VisualizeConfig
) -> Shown:
    """`count` of the annotations `candidates`, spread evenly over them. Raises UserError and UnreadableImage."""
    rows = evenly(candidates, config.count)
    dataset = annotated_crops(model, annotations, str(config.images), rows)
    batch = collate([dataset[row] for row in range(len(dataset))])
    areas = oks_areas(annotations, read_json(annotations.path))[rows]
    return Shown(model, batch.to(next(model.parameters()).device), dataset, areas)


@contextmanager
def listening(model: PoseModel) -> Iterator[dict[nn.Module, Tensor]]:
    """What the layers that Fig. 12 shows give in the forward pass within, by the layer."""
    heard: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        heard[module] = output.detach().float().cpu()

    def keep_read(module: nn.Module, given: tuple[Tensor]) -> None:
        heard[module] = given[0].detach().float().cpu()

    with ExitStack() as stack:
        if isinstance(model.head, CCMHead):
            for mixer in mixers_of(model.head):
                parts = [*mixer.dilated, mixer.deconv_norm, mixer.se, mixer]
                for part in parts:
                    if part is not None:
                        stack.callback(part.register_forward_hook(keep).remove)
        else:
            stack.callback(model.head.final_layer.register_forward_pre_hook(keep_read).remove)
        yield heard


def feature_maps(model: PoseModel, heard: dict[nn.Module, Tensor]) -> list[FeatureMap]:
    """The maps of Fig. 12 by its names, level by level, of what `listening` heard."""
    if not isinstance(model.head, CCMHead):
        return [FeatureMap(1, "last map", heard[model.head.final_layer])]
    found: list[FeatureMap] = []
    for level, mixer in enumerate(mixers_of(model.head), start=1):
        found += [FeatureMap(level, f"HDC {k}", heard[part]) for k, part in enumerate(mixer.dilated, start=1)]
        if mixer.residual is not None:  # else the first term of Eq. 4 is all there is
            context = heard[mixer.deconv_norm]
            name = " x ".join(["HDC"] * bool(len(mixer.dilated)) + ["SE"] * (mixer.se is not None))
            found.append(FeatureMap(level, name, context if mixer.se is None else context * heard[mixer.se]))
        found.append(FeatureMap(level, "Deconv", heard[mixer]))
    return found


def mixers_of(head: CCMHead) -> list[ContextMixer]:
    """The cascade, first to last."""
    return [mixer for mixer in head.mixers if isinstance(mixer, ContextMixer)]


def hidden_joints(name: str, skeleton: Skeleton) -> tuple[int, ...]:
    """The joints that one of `hide` names. Raises UserError for an unknown one, and a half that nothing says."""
    if not is_half(name, skeleton):
        try:
            return skeleton.indices(name.split("+"))
        except UserError as error:
            raise UserError(f"hide {name}: {error}; or {' or '.join(HALVES)} alone") from None
    upper = skeleton.indices(skeleton.upper_body)
    joints = tuple(j for j in range(len(skeleton.joints)) if (j in upper) == (name == "upper"))
    if not upper or not joints:
        raise UserError(
            f"hide {name}: skeleton {skeleton.name!r} of the checkpoint does not say which joints are the upper_body; "
            f"name joints instead: {', '.join(skeleton.joints)}"
        )
    return joints


def is_half(name: str, skeleton: Skeleton) -> bool:
    """Whether one of `hide` is half of the body, not a joint."""
    return name in HALVES and name not in skeleton.joints


def labels_in_crops(dataset: TopDownDataset) -> tuple[np.ndarray, np.ndarray]:
    """Where the labels are, `[N, K, 2]` input pixels, and which of them lie in the crop, `[N, K]` bool."""
    affines = box_to_affine(dataset.boxes, dataset.size, padding=dataset.padding, alignment=dataset.alignment)
    xy = apply_affine(affines, dataset.keypoints)
    last = np.array(dataset.size[::-1]) - 1
    return xy, (dataset.visibility > 0) & (xy >= 0).all(-1) & (xy <= last).all(-1)


def persons_to_hide(dataset: TopDownDataset, joints: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Which of N persons have a label in the crop for all that is hidden `[N]`; of halves two, and two of the other."""
    inside = labels_in_crops(dataset)[1]
    possible = np.ones(len(inside), dtype=bool)
    for name, its in joints.items():
        mine = np.isin(np.arange(inside.shape[1]), its)
        if is_half(name, dataset.skeleton):
            possible &= (inside[:, mine].sum(1) >= 2) & (inside[:, ~mine].sum(1) >= 2)
        else:
            possible &= inside[:, mine].all(1)
    return possible


def hide(name: str, joints: tuple[int, ...], shown: Shown) -> Hidden:
    """The masks of one of `hide`."""
    xy, inside = labels_in_crops(shown.dataset)
    height, width = shown.dataset.size
    y, x = np.mgrid[:height, :width]
    # [B, K, H, W]; a joint that is not labelled is infinitely far away
    distance = np.hypot(x - xy[..., 0, None, None], y - xy[..., 1, None, None])
    distance = np.where(inside[..., None, None], distance, np.inf)
    mine = np.isin(np.arange(inside.shape[1]), joints)
    if is_half(name, shown.model.skeleton):
        masks = mine[distance.argmin(1)]
    else:
        masks = np.any(distance[:, mine] <= RADIUS * max(height, width), axis=1)
    return Hidden(name.replace("_", " ").replace("+", ", "), joints, np.asarray(masks))


def painted(shown: Shown, masks: np.ndarray) -> CropBatch:
    """The crops with the masks `[B, H, W]` in the colour that the network takes for 0."""
    given = shown.model.input
    mean = given.mean[::-1] if given.color == "bgr" else given.mean
    colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8, device=shown.batch.images.device)
    masked = torch.from_numpy(masks).to(shown.batch.images.device)[:, None]
    return replace(shown.batch, images=torch.where(masked, colour[:, None, None], shown.batch.images))


def fits(shown: Shown, keypoints: Tensor, joints: Sequence[int]) -> np.ndarray:
    """OKS `[B]` of poses `[B, K, 2]`, image pixels, over some joints alone, those that are labelled."""
    chosen = list(joints)
    truth, visibility = (
        torch.from_numpy(values[:, chosen]) for values in (shown.dataset.keypoints, shown.dataset.visibility)
    )
    sigmas = [shown.model.skeleton.sigmas[joint] for joint in chosen]
    areas = torch.from_numpy(shown.areas)
    return oks_of_pairs(keypoints[:, chosen].double(), truth, areas, sigmas, visibility).numpy()


def enlarged_crops(images: Tensor) -> list[np.ndarray]:
    """Crops `[B, 3, H, W]` uint8 RGB enlarged to HEIGHT, `[h, w, 3]` each."""
    height, width = images.shape[-2:]
    factor = HEIGHT / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    kind = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    crops = images.permute(0, 2, 3, 1).cpu().numpy()
    return [cv2.resize(np.ascontiguousarray(crop), size, interpolation=kind) for crop in crops]


def in_enlarged(shown: Shown, keypoints: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Keypoints `[B, K, 2]` from image pixels to those of an enlarged crop."""
    data = shown.dataset
    affines = box_to_affine(data.boxes, data.size, padding=data.padding, alignment=data.alignment)
    factor = np.array(crop.shape[1::-1]) / np.array(data.size[::-1])
    return (apply_affine(affines, keypoints) + 0.5) * factor - 0.5


def spread(heat: np.ndarray) -> np.ndarray:
    """A map `[h, w]` from 0, its least, to 1, its greatest; 0 where all is equal."""
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def overlaid(crop: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A crop `[h, w, 3]`, grey, under a map `[h', w']` of 0 to 1."""
    larger = cv2.resize(heat.astype(np.float32), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = np.asarray(colormaps[COLOURS](larger))[..., :3] * 255
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[..., None]
    return np.rint(OPACITY * colours + (1 - OPACITY) * grey).astype(np.uint8)


def framed(axes: Axes, image: np.ndarray, title: str) -> None:
    """A picture in a cell that was switched off."""
    axes.set_axis_on()
    show(axes, image)
    axes.set_title(title, fontsize=9)
