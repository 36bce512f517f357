"""One vector per picture: the deepest map of a backbone, averaged over the picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .backbones import Backbone
from .checkpoint import load_exactly, read_export
from .config import InputConfig, Named
from .datasets.centre import centre_crop
from .datasets.sampling import decode_image, worker_init
from .datasets.unlabelled import Pictures
from .errors import CheckFailed, UnreadableImage, UserError
from .model import build_backbone, load_model, normalise
from .neighbours import unit


class Embedded(NamedTuple):
    """The vectors of the M pictures that could be read."""

    vectors: Tensor
    """`[M, C]` float32 on the CPU, of length 1, rounded as `neighbours.unit` does."""
    rows: Tensor
    """`[M]` int64, the pictures' indices, rising."""
    unreadable: list[str]
    """A message for each of the others."""


def load_backbone(path: str | Path) -> tuple[Backbone, InputConfig]:
    """The backbone of a hand-off file and the input it was trained on, on the CPU in eval mode.

    Of a pose model's HRNet only the top branch is in the file: its backbone gives one map, the finest.

    Raises:
        UserError: not a hand-off file, or one whose weights do not fit what it describes.
    """
    state, described = read_export(path)
    try:
        if described["skeleton"] is not None:
            model = load_model(path)
            return model.backbone, model.input
        named = Named(**described["backbone"])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described["input"].items()
        }
        input = InputConfig(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the metadata 'poserelay' lacks or misnames {error}; export the file again") from error
    try:
        backbone = build_backbone(named)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    weights = {n.removeprefix("backbone."): value for n, value in state.items() if not n.startswith("head.")}
    load_exactly(backbone, weights, path)
    return backbone.eval(), input


def embed(
    backbone: Backbone,
    input: InputConfig,
    pictures: Pictures,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Embedded:
    """Embed the pictures with `backbone`, on its device, in eval mode and fp32; the modes it was in are put back.

    A picture is turned upright and its centre cropped (`centre_crop`) to a square of the input's longer side: the usual
    evaluation crop where the input is square, and whatever the shape of a pose model's input persons fill its height.
    No random number is drawn, and the vectors do not depend on the number of workers. `progress` shows a bar on a
    terminal.

    Raises:
        CheckFailed: a vector is not finite.
    """
    loader = DataLoader(
        _Crops(pictures, max(input.height, input.width)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # a loader would otherwise draw its workers' seed from the global one
    )
    device = next(backbone.parameters()).device
    vectors: list[Tensor] = [torch.empty(0, backbone.channels[-1])]
    rows: list[int] = []
    unreadable: list[str] = []
    with evaluating(backbone), torch.inference_mode():
        bar = tqdm(loader, "embed", unit="batch", leave=False, disable=None if progress else True)
        for crops, indices, messages in bar:
            rows += indices
            unreadable += messages
            if indices:
                maps = backbone(normalise(crops.to(device, non_blocking=True), input))[-1]
                vectors.append(maps.float().mean((-2, -1)).cpu())
    try:
        return Embedded(unit(torch.cat(vectors)), torch.tensor(rows, dtype=torch.int64), unreadable)
    except ValueError as error:
        raise CheckFailed(
            f"the backbone's output holds NaN or infinity ({error}); its weights are damaged, or diverged in training"
        ) from error


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode within the `with` block; every submodule then gets its own mode back."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


class _Crops(Dataset[tuple[int, Tensor | str]]):
    """(index, uint8 RGB `[3, size, size]`), or (index, message) for a picture that cannot be read."""

    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures = pictures
        self.size = size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = decode_image(self.pictures.read(index), self.pictures.name(index), orientation="exif")
        except UnreadableImage as error:
            return index, str(error)
        return index, torch.from_numpy(centre_crop(image, self.size)).permute(2, 0, 1)


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor, list[int], list[str]]:
    crops = [crop for _, crop in items if isinstance(crop, Tensor)]
    return (
        torch.stack(crops) if crops else torch.empty(0),
        [index for index, crop in items if isinstance(crop, Tensor)],
        [crop for _, crop in items if isinstance(crop, str)],
    )
