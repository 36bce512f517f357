"""Other people's checkpoint layouts: how their keys are named, told apart, and called here. Imports no torch.

Read from the code of each project. All their ResNets share torchvision's names and all their HRNets those of the
authors' code, so a layout is a list of prefixes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple


class Layout(NamedTuple):
    """The keys of one project's files."""

    renames: tuple[tuple[str, str | None], ...]
    """(start of a key, start of its name here, or None: left out). The first that fits counts; a key that none fits is
    an error. Two keys with one name here must be equal bit by bit."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Channel order of the pictures that these weights were trained on."""


def _left_out(*starts: str) -> tuple[tuple[str, None], ...]:
    return tuple((start, None) for start in starts)


# nn.Sequential(*list(resnet.children())[:-1]), which lightly's examples call the backbone.
_SEQUENTIAL_RESNET = (
    ("backbone.0.", "backbone.conv1."),
    ("backbone.1.", "backbone.bn1."),
    ("backbone.4.", "backbone.layer1."),
    ("backbone.5.", "backbone.layer2."),
    ("backbone.6.", "backbone.layer3."),
    ("backbone.7.", "backbone.layer4."),
)
_BACKBONE = (("backbone.", "backbone."),)

LAYOUTS: dict[str, Layout] = {
    "simsiam": Layout((*_left_out("encoder.fc.", "predictor."), ("encoder.", "backbone."))),
    "moco": Layout((*_left_out("encoder_q.fc.", "encoder_k.", "queue"), ("encoder_q.", "backbone."))),
    "densecl": Layout((("", "backbone."),)),
    "mmselfsup": Layout(
        (
            # The same network again, as the first part of a Sequential.
            ("encoder.0.", "backbone."),
            ("encoder_q.0.", "backbone."),
            ("online_net.0.", "backbone."),
            *_left_out("encoder.1.", "encoder_q.1.", "online_net.1."),
            *_left_out("neck.", "head.", "encoder_k.", "target_net.", "queue"),
            *_BACKBONE,
        )
    ),
    "mmpretrain": Layout((*_left_out("neck.", "head.", "encoder_k.", "target_net.", "queue"), *_BACKBONE)),
    "solo": Layout(
        (
            *_left_out("classifier.", "projector.", "predictor.", "prototypes.", "queue", "head."),
            *_left_out("momentum_backbone.", "momentum_encoder.", "momentum_projector.", "momentum_classifier."),
            *_left_out("momentum_predictor.", "momentum_head.", "dino_loss_func."),
            *_BACKBONE,
            ("encoder.", "backbone."),  # older versions
        )
    ),
    "lightly": Layout(
        (
            *_left_out("projection_head", "prediction_head", "online_classifier.", "criterion.", "prototypes."),
            *_left_out("backbone_momentum.", "student_", "teacher_", "query_", "key_", "memory_bank.", "queues."),
            *_SEQUENTIAL_RESNET,
            *_BACKBONE,
        )
    ),
    "torchvision": Layout((*_left_out("fc."), ("", "backbone."))),
    # Only where the backbone itself has no such key: an HRNet's stem has a bn2, a MobileNet-v2 ends in conv_head.
    "timm": Layout(
        (
            *_left_out("fc.", "classifier.", "head.", "norm.", "conv_head.", "bn2."),
            *_left_out("incre_modules.", "downsamp_modules.", "final_layer."),
            ("", "backbone."),
        )
    ),
    "pose_resnet": Layout(
        (("deconv_layers.", "head.deconv_layers."), ("final_layer.", "head.final_layer."), ("", "backbone.")),
        color="bgr",
    ),
    "pose_hrnet": Layout((("final_layer.", "head.final_layer."), ("", "backbone."))),
    "mmpose": Layout((("keypoint_head.", "head."), ("head.", "head."), *_BACKBONE)),
}

_WRAPPED = r"(encoder|encoder_q|online_net)\.0\."
_POSE_HEAD = r"keypoint_head\.|head\.(final_layer|deconv_layers)\."
_RESNET = r"layer1\.0\.conv1\."
_HRNET = r"stage4\.0\.branches\."
# What tells a layout: patterns of which some key begins with each, and patterns with which none may begin.
_SIGNS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "simsiam": ((r"encoder\.conv1\.", r"encoder\.fc\."), (r"backbone\.", r"classifier\.")),
    "moco": ((r"encoder_q\.conv1\.",), (r"backbone\.",)),
    "mmselfsup": ((r"backbone\.", _WRAPPED), (_POSE_HEAD,)),
    "mmpretrain": ((r"backbone\.", r"(neck|head)\."), (_WRAPPED, _POSE_HEAD, r"classifier\.")),
    "solo": ((r"(backbone|encoder)\.", r"classifier\."), (r"encoder\.fc\.", _WRAPPED)),
    "lightly": ((r"backbone\.", r"projection_head\.|online_classifier\."), (r"(neck|head|classifier)\.",)),
    "torchvision": ((rf"{_RESNET}|stage2\.0\.branch1\.",), (r"deconv_layers\.", r"final_layer\.", _HRNET)),
    "timm": ((rf"conv_stem\.|{_HRNET}",), (r"final_layer\.(weight|bias)",)),
    "pose_resnet": ((_RESNET, r"deconv_layers\.|final_layer\."), (_HRNET,)),
    "pose_hrnet": ((_HRNET, r"final_layer\.(weight|bias)"), ()),
    "mmpose": ((r"backbone\.", _POSE_HEAD), ()),
}


def recognise(keys: Collection[str], marks: Collection[str]) -> list[str]:
    """The layouts that these keys may be of; `marks` are the entries beside the state dict in the file.

    A plain ResNet is called torchvision, also where timm wrote it: their names are the same.
    """

    def some(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in keys)

    found = [name for name, (signs, others) in _SIGNS.items() if all(map(some, signs)) and not any(map(some, others))]
    return ["densecl"] if found == ["torchvision"] and "author" in marks else found


def summary(keys: Collection[str]) -> str:
    """`backbone. (318), head. (2)`: the keys by their first part, most frequent first."""
    counts = Counter(key.partition(".")[0] + "." * ("." in key) for key in keys)
    shown = ", ".join(f"{start} ({count})" for start, count in counts.most_common(8))
    return shown + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")


# (has a third convolution, blocks per stage, channels out and in of the first stage's second convolution)
_RESNETS: dict[tuple[bool, tuple[int, ...], tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2), (64, 64)): "resnet18",
    (False, (3, 4, 6, 3), (64, 64)): "resnet34",
    (True, (3, 4, 6, 3), (64, 64)): "resnet50",
    (True, (3, 4, 23, 3), (64, 64)): "resnet101",
    (True, (3, 8, 36, 3), (64, 64)): "resnet152",
    (True, (3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
}
_HRNETS: dict[tuple[int, ...], str] = {(32,): "hrnet_w32", (48,): "hrnet_w48"}


def deduce_backbone(shapes: Mapping[str, Sequence[int]]) -> tuple[str | None, str]:
    """The backbone whose keys (without prefix) have these shapes, or None; and what was found, in words.

    Goes by the majority where single keys are missing or damaged, which a comparison of all keys will name.
    """
    if any(re.match(_HRNET, key) for key in shapes):
        width = _commonest(shapes, r"stage4\.0\.branches\.0\.\d+\.conv\d\.weight", 1)
        return _HRNETS.get(width), f"an HRNet of width {width}"
    if any(key.startswith("conv_stem.") for key in shapes):
        last = _commonest(shapes, r"blocks\.6\.0\.conv_pwl\.weight", 2)
        return ("mobilenetv2_100" if last == (320, 960) else None), f"a mobile network whose blocks end in {last}"
    if any(key.startswith("stage2.0.branch1.") for key in shapes):
        last = _commonest(shapes, r"conv5\.0\.weight", 2)
        return ("shufflenet_v2_x1_5" if last == (1024, 704) else None), f"a ShuffleNet that ends in {last}"
    blocks = {
        tuple(map(int, found.groups())) for found in (re.match(r"layer(\d)\.(\d+)\.", key) for key in shapes) if found
    }
    if not blocks:
        return None, f"no network known here: {summary(shapes)}"
    stages = tuple(len({block for stage, block in blocks if stage == wanted}) for wanted in range(1, 5))
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in shapes)
    width = _commonest(shapes, r"layer1\.\d+\.conv2\.weight", 2)
    kind = "bottleneck" if bottleneck else "basic"
    name = _RESNETS.get((bottleneck, stages, width))
    return name, f"a ResNet of {' + '.join(str(count) for count in stages if count)} {kind} blocks of width {width}"


def _commonest(shapes: Mapping[str, Sequence[int]], pattern: str, sizes: int) -> tuple[int, ...]:
    counts = Counter(tuple(shape)[:sizes] for key, shape in shapes.items() if re.fullmatch(pattern, key))
    return counts.most_common(1)[0][0] if counts else ()
