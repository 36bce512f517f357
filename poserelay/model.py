"""Pose models, top-down and single-stage: a backbone and a head, built from a ModelConfig or from a hand-off file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from .backbones import BACKBONES, Backbone
from .backbones.hrnet import drop_unused_fuse, is_hrnet
from .backbones.penultimate import with_penultimate
from .checkpoint import load_exactly, read_export
from .config import InputConfig, ModelConfig, Named
from .errors import UserError
from .heads import HEADS, REFINERS, SCIO, SINGLE_STAGE, CCMHead, CIRHead, DeconvHead, HRNetHead
from .heads.cir import CIRMaps
from .keypoints import Skeleton, load_skeleton

Choice = TypeVar("Choice")


class PoseModel(nn.Module):
    """A top-down pose model: one heatmap per joint of a person's crop.

    Args:
        backbone: gives the maps that `head` reads.
        head: gives one heatmap per joint of `skeleton`.
        skeleton: the joints, in the order of the heatmaps.
        config: what the model was built from; its `input` is the crop.
        refiner: SCIO's networks, which `inference` asks about the distal joints; None: the heatmaps stand.

    Raises:
        UserError: the crop's size does not divide evenly through the network.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: DeconvHead | HRNetHead | CCMHead,
        skeleton: Skeleton,
        config: ModelConfig,
        refiner: SCIO | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.refiner = refiner
        self.skeleton = skeleton
        self.config = config
        self.input = config.input
        read = backbone.strides[head.level]
        if read % head.upsampling:
            raise UserError(f"model.head: upsamples by {head.upsampling} a map of stride {read}; upsample less")
        self.stride = read // head.upsampling
        """Input pixels per heatmap pixel."""

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """Height and width of the heatmaps, heatmap pixels."""
        return self.input.height // self.stride, self.input.width // self.stride

    def preprocess(self, images: Tensor) -> Tensor:
        """`normalise` crops `[B, 3, H, W]`, uint8 RGB, for this model."""
        return normalise(images, self.input)

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised crops `[B, 3, H, W]` into heatmaps `[B, K, h, w]`."""
        return self.head(self.backbone(images))

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`'s heatmaps and f, the map `[B, C, h, w]` that the head's last layer reads."""
        features = self.head.features(self.backbone(images))
        return self.head.final_layer(features), features

    def refined(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`with_features`, and the heatmaps with the distal joints' as SCIO's prediction networks have them (Eq. 3)."""
        assert self.refiner is not None
        maps, features = self.with_features(images)
        learned = maps.clone()
        learned[:, self.refiner.distal] = self.refiner.predict(maps, features).to(maps.dtype)
        return maps, features, learned

    def supervised(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What training supervises: `forward`'s heatmaps, those of CCM's auxiliary decoder where it has one, and f.

        images: normalised crops `[B, 3, H, W]`. The auxiliary maps `[B, K, h', w']` may have another size; f is the map
        `[B, C, h, w]` that the head's last layer reads.
        """
        auxiliary = self.head.auxiliary if isinstance(self.head, CCMHead) else None
        if auxiliary is None:
            maps, features = self.with_features(images)
            return maps, None, features
        levels, penultimate = with_penultimate(self.backbone, images)
        features = self.head.features(levels)
        return self.head.final_layer(features), auxiliary([penultimate]), features

    def predict(
        self, images: Sequence[np.ndarray | str | Path], boxes: Sequence[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results for the persons in `boxes`, as `inference.predict_images` describes them.

        images: `[H, W, 3]` uint8 RGB, or paths; boxes: for each image `[n, 4]` xywh, image pixels.

        Raises:
            ValueError: without boxes, or as `predict_images`.
            UnreadableImage: a path that is not a whole picture.
        """
        if boxes is None:
            raise ValueError(
                "this is a top-down model: give boxes, one array [n, 4] of x, y, width, height per image "
                "(from a person detector, or [[0, 0, width, height]] for a picture of one person)"
            )
        # Imported here because inference needs the whole data path, which training a backbone does not.
        from .inference import predict_images

        return predict_images(self, images, boxes)


class SingleStageModel(nn.Module):
    """A single-stage pose model: whole images in, all persons out, no detector (Xiao et al., AAAI 2022).

    Args:
        backbone: gives the maps that `head` reads, all of them.
        head: gives a score map, and displacements from its pixels to the joints of `skeleton`.
        skeleton: the joints, in the order of the displacements.
        config: what the model was built from; its `input` is the square that training crops, whose side is also the
            short side of images in evaluation.
    """

    refiner = None

    def __init__(self, backbone: Backbone, head: CIRHead, skeleton: Skeleton, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.skeleton = skeleton
        self.config = config
        self.input = config.input
        self.stride = backbone.strides[0]
        """Input pixels per map pixel: x in the map is x in the input divided by this."""

    def preprocess(self, images: Tensor) -> Tensor:
        """`normalise` images `[B, 3, H, W]`, uint8 RGB, for this model."""
        return normalise(images, self.input)

    def maps(self, images: Tensor) -> CIRMaps:
        """Turn normalised images `[B, 3, H, W]` into the head's maps; H and W are multiples of the coarsest stride."""
        return self.head(self.backbone(images))

    def forward(self, images: Tensor, pixels: Tensor) -> tuple[CIRMaps, Tensor]:
        """`maps`, and from their pixels `[B, P, 2]` (x, y) the displacements to the joints, `[B, P, K, 2]`."""
        maps = self.maps(images)
        return maps, self.head.displacements(maps.joints, pixels)

    def predict(
        self, images: np.ndarray | str | Path | Sequence[np.ndarray | str | Path], boxes: None = None
    ) -> list[dict[str, Any]]:
        """COCO results for all persons of the images, as `whole_images.predict_whole` describes them.

        images: `[H, W, 3]` uint8 RGB, or a path, or several of either. No boxes: the model finds the persons.

        Raises:
            ValueError: with boxes, or an image of another shape or type.
            UnreadableImage: a path that is not a whole picture.
        """
        if boxes is not None:
            raise ValueError("this is a single-stage model, which finds the persons itself: give no boxes")
        # Imported here because inference needs the whole data path, which training a backbone does not.
        from .whole_images import predict_whole

        if isinstance(images, np.ndarray | str | Path):
            images = [images]
        elif not isinstance(images, Sequence):
            raise ValueError(f"images is a {type(images).__name__}; give arrays [H, W, 3] uint8 RGB, or paths")
        return predict_whole(self, images)


def normalise(images: Tensor, input: InputConfig) -> Tensor:
    """Turn uint8 RGB `[..., 3, H, W]` into float32 in the network's channel order, mean and standard deviation."""
    mean = 255 * torch.tensor(input.mean, device=images.device)[:, None, None]
    std = 255 * torch.tensor(input.std, device=images.device)[:, None, None]
    if input.color == "bgr":
        images = images.flip(-3)
    return images.float().sub(mean).div_(std)


def build_backbone(named: Named) -> Backbone:
    """The backbone that `named` describes, with all its levels.

    Raises:
        UserError: an unknown name or keyword argument, or pretrained weights that cannot be fetched.
    """
    constructor = _choose("model.backbone", named, BACKBONES)
    check_kwargs("model.backbone", named, constructor)
    return constructor(**named.kwargs)


def is_single_stage(head: Named | None) -> bool:
    """Whether a model with this head takes whole images, and `build_single_stage` builds it."""
    return head is not None and head.name in SINGLE_STAGE


def build_single_stage(config: ModelConfig, skeleton: Skeleton | None = None) -> SingleStageModel:
    """The single-stage model that `config` describes, for `skeleton` (by default the one that the config names).

    Raises:
        UserError: another head, a refiner, an unknown name or keyword argument, or an input that is no square of a
            multiple of the backbone's coarsest stride.
    """
    if config.head is None or config.head.name not in SINGLE_STAGE:
        found = "null" if config.head is None else repr(config.head.name)
        raise UserError(f"model.head is {found}; a single-stage model needs one of {', '.join(SINGLE_STAGE)}")
    if config.refiner is not None:
        raise UserError("model.refiner: a single-stage model has none; leave it out")
    skeleton = skeleton or _skeleton_of(config)
    head_class = SINGLE_STAGE[config.head.name]
    check_kwargs("model.head", config.head, head_class, given=("in_channels", "num_joints"))
    backbone = build_backbone(config.backbone)
    size, coarsest = config.input, max(backbone.strides)
    if size.height != size.width or size.height <= 0 or size.height % coarsest:
        raise UserError(
            f"model.input is {size.height} x {size.width}; a single-stage model crops a square, of a positive multiple "
            f"of {coarsest} (the stride of {config.backbone.name}): give height and width alike"
        )
    if size.alignment != "hrnet":
        raise UserError("model.input.alignment: a single-stage model divides by the stride; set it to hrnet")
    head = head_class(backbone.channels, len(skeleton.joints), **config.head.kwargs)
    return SingleStageModel(backbone, head, skeleton, config)


def _skeleton_of(config: ModelConfig) -> Skeleton:
    if config.skeleton == "auto":
        raise UserError("model.skeleton is auto and there is no annotation file to derive it from; name one")
    return load_skeleton(config.skeleton)


def build_model(config: ModelConfig, skeleton: Skeleton | None = None) -> PoseModel:
    """The pose model that `config` describes, for `skeleton` (by default the one that the config names).

    Raises:
        UserError: no head, an unknown name or keyword argument, parts or a size that do not go together.
    """
    if config.head is None:
        raise UserError("model.head is null: a pose model needs a head; choose from " + ", ".join(HEADS))
    skeleton = skeleton or _skeleton_of(config)
    if config.head.name in SINGLE_STAGE:
        raise UserError(
            f"model.head {config.head.name!r} is a single-stage model's, and this is for top-down ones; choose from "
            f"{', '.join(HEADS)} (python -m finetune cir trains it)"
        )
    head_class = _choose("model.head", config.head, HEADS)
    check_kwargs("model.head", config.head, head_class, given=("in_channels", "num_joints"))
    backbone = build_backbone(config.backbone)
    if head_class is not CCMHead and is_hrnet(backbone) != (head_class is HRNetHead):
        raise UserError(
            f"model.head {config.head.name!r} does not go with model.backbone {config.backbone.name!r}: "
            "use hrnet with an HRNet, simple with the others, and ccm with either"
        )
    coarsest = max(backbone.strides)
    for side in ("height", "width"):
        if getattr(config.input, side) % coarsest or getattr(config.input, side) <= 0:
            raise UserError(
                f"model.input.{side} is {getattr(config.input, side)}; give a positive multiple of {coarsest}, the "
                f"stride of {config.backbone.name}"
            )
    if is_hrnet(backbone):
        drop_unused_fuse(backbone)
    head = head_class(backbone.channels, len(skeleton.joints), **config.head.kwargs)
    refiner = None
    if config.refiner is not None:
        refiner_class = _choose("model.refiner", config.refiner, REFINERS)
        check_kwargs("model.refiner", config.refiner, refiner_class, given=("in_channels", "groups"))
        if not skeleton.groups:
            raise UserError(
                f"model.refiner {config.refiner.name}: skeleton {skeleton.name!r} declares no groups; give its YAML "
                "file a field groups: [{proximal: [A, B, C], distal: D}, ...], or set model.refiner to null"
            )
        groups = [skeleton.indices((*group.proximal, group.distal)) for group in skeleton.groups]
        refiner = refiner_class(head.final_layer.in_channels, groups, **config.refiner.kwargs)
    return PoseModel(backbone, head, skeleton, config, refiner)


def load_top_down(path: str | Path) -> PoseModel:
    """`load_model` where crops of persons are to be given; UserError for a single-stage model."""
    model = load_model(path)
    if isinstance(model, SingleStageModel):
        raise UserError(
            f"{path}: holds a single-stage model (head {model.config.head and model.config.head.name}), and this works "
            "on crops of persons; give a top-down model"
        )
    return model


def load_model(path: str | Path) -> PoseModel | SingleStageModel:
    """The pose model of a hand-off file, rebuilt from the file alone, on the CPU in eval mode.

    Raises:
        UserError: not a hand-off file, a backbone's, or one whose weights do not fit what it describes.
    """
    state, described = read_export(path)
    try:
        if described["skeleton"] is None:
            raise UserError(
                f"{path}: holds a backbone (stage {described['stage']}), no pose model; "
                "fine-tune it first: python -m finetune --init_from FILE"
            )
        skeleton = Skeleton.from_dict(described["skeleton"], f"{path}: skeleton")
        crop: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described["input"].items()
        }
        config = ModelConfig(
            backbone=Named(**described["backbone"]),
            head=Named(**described["head"]),
            refiner=Named(**described["refiner"]) if described["refiner"] else None,
            skeleton=skeleton.name,
            input=InputConfig(**crop),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the metadata 'poserelay' lacks or misnames {error}; export the file again") from error
    try:
        model = (build_single_stage if is_single_stage(config.head) else build_model)(config, skeleton)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    load_exactly(model, state, path)
    return model.eval()


def check_kwargs(field: str, named: Named, constructor: Callable[..., Any], given: Collection[str] = ()) -> None:
    """Check `named.kwargs` against the signature of `constructor`, all problems in one UserError.

    field: what `named` is called in the config; given: parameters that the caller passes itself.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(constructor, eval_str=True).parameters.items()
        if name not in given
    }
    problems = []
    for name, value in named.kwargs.items():
        if name not in parameters:
            problems.append(
                f"has no {name!r}, only {', '.join(parameters) or 'none at all'} (a config file's kwargs stay when the "
                "command line replaces the name alone: give kwargs too)"
            )
        elif problem := _mistyped(name, value, parameters[name].annotation):
            problems.append(problem)
    problems += [
        f"needs {name!r}"
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in named.kwargs
    ]
    if problems:
        raise UserError(f"{field}.kwargs of {named.name}: {'; '.join(problems)}")


def _mistyped(name: str, value: Any, annotation: Any) -> str | None:
    """What is wrong with a value, or None; text is not read as a number or a boolean."""
    expected = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    problem = f"{name} is {value!r}, expected {expected.replace('typing.', '').replace('collections.abc.', '')}"
    if value is None and type(None) not in get_args(annotation):
        return problem
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=annotation)
    try:
        parsed = parser.parse_object({name: value})[name]
        if not isinstance(value, str) or parsed == value:
            return None
    except ArgumentError:
        pass
    return problem


def _choose(field: str, named: Named, choices: Mapping[str, Choice]) -> Choice:
    if named.name not in choices:
        near = difflib.get_close_matches(named.name, list(choices), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{field} {named.name!r} is not known{hint}; choose from {', '.join(choices)}")
    return choices[named.name]
