"""Hard views against PIL, OpenCV and naive loops."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from poserelay.heatmaps import decode, encode, input_to_heatmap
from semi.views import CUTOUT_INPUT, OPERATIONS, HardViews, resample, turn_matrices

SIZE = (64, 48)


def pictures(count: int, height: int = 40, width: int = 30, seed: int = 0) -> Tensor:
    """Smooth uint8 pictures with all intensities."""
    noise = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=True)
    return (smooth * 255).clamp(0, 255).to(torch.uint8)


def pil(name: str, image: Image.Image, magnitude: int, sign: int) -> Image.Image:
    """The operation as the published code's RandAugment computes it."""
    strength = magnitude / 30
    enhance = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhance:
        return enhance[name](image).enhance(1 + sign * 0.9 * strength)
    if name == "solarize_add":
        added = np.clip(np.array(image).astype(int) + int(110 * strength), 0, 255).astype(np.uint8)
        return ImageOps.solarize(Image.fromarray(added), 128)
    plain = {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: ImageOps.posterize(image, max(2, 6 - int(4 * strength))),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * strength),
    }
    return plain[name]()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 20, 30])
def test_each_operation_is_pils(name: str, magnitude: int) -> None:
    images = pictures(3)
    for sign in (-1, 1):
        ours = OPERATIONS[name](images, magnitude / 30, sign)
        for image, result in zip(images, ours, strict=True):
            wanted = np.array(pil(name, Image.fromarray(image.permute(1, 2, 0).numpy()), magnitude, sign)).astype(int)
            assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 2


def test_colour_draws_each_operation_for_some_crops_and_the_same_again() -> None:
    views = HardViews(rand_augment=1, magnitude=20)
    images = pictures(1).expand(200, -1, -1, -1)
    first, second = (views.colour(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    kinds = {bytes(image.numpy().tobytes()) for image in first}
    # Ten operations, four of them with two signs, and rectangles in places of their own.
    assert len(kinds) > 14
    assert torch.equal(HardViews(rand_augment=0).colour(images, torch.Generator()), images)


def squares_of(height: int, width: int, joints: np.ndarray, generator: torch.Generator, views: HardViews) -> np.ndarray:
    """What a loop over crops, squares and pixels cuts."""
    drawn = torch.randint(joints.shape[1], (len(joints), views.cutout_joints), generator=generator)
    jitter = torch.randn(len(joints), views.cutout_joints, 2, generator=generator) * 10
    half = torch.randint(10, 20, (len(joints), views.cutout_joints, 2), generator=generator)
    unit = 1 if views.compat else min(height, width) / CUTOUT_INPUT
    cut = np.zeros((len(joints), height, width), dtype=bool)
    for crop in range(len(joints)):
        for square in range(views.cutout_joints):
            x, y = np.trunc(joints[crop, drawn[crop, square]] + jitter[crop, square].numpy() * unit)
            w, h = half[crop, square].numpy() * unit
            bottom = width if views.compat else height  # the published code clamps y at the width
            for row in range(height):
                for column in range(width):
                    inside = max(0, x - w) <= column < min(width, x + w) and max(0, y - h) <= row < min(bottom, y + h)
                    cut[crop, row, column] |= inside
    return cut


@pytest.mark.parametrize(("compat", "size"), [(False, (48, 36)), (False, (40, 64)), (True, (48, 36))])
def test_joint_cutout(compat: bool, size: tuple[int, int]) -> None:
    views = HardViews(cutout_joints=3, compat=compat)
    joints = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([size[1], size[0]])
    images = torch.randn(4, 3, *size)
    cut = views.cut(images, joints, torch.Generator().manual_seed(2))
    wanted = squares_of(*size, joints.numpy(), torch.Generator().manual_seed(2), views)
    assert wanted.any()
    assert np.array_equal((cut == 0).all(1).numpy(), wanted)
    assert torch.equal(cut[cut != 0], images[cut != 0])


def test_published_cutout_spares_the_bottom_quarter_and_ours_does_not() -> None:
    joints = torch.tensor([[96.0, 240.0]]).expand(16, 1, 2)
    images = torch.ones(16, 3, 256, 192)
    for compat in (True, False):
        cut = HardViews(cutout_joints=5, compat=compat).cut(images, joints, torch.Generator().manual_seed(0))
        assert bool((cut == 0).any()) != compat


def test_a_turned_crop_is_opencvs() -> None:
    image = pictures(1, *SIZE)[0].float()
    angle, factor = 0.4, 1.2
    ours = resample(image[None], turn_matrices(torch.tensor([angle]), torch.tensor([factor])), SIZE)[0]
    centre = ((SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2)
    inverse = cv2.getRotationMatrix2D(centre, math.degrees(angle), factor)  # result -> source
    warped = cv2.warpAffine(
        image.permute(1, 2, 0).numpy(), inverse, SIZE[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    inner = (slice(None), slice(8, -8), slice(8, -8))  # OpenCV rounds places to 1/32 of a pixel
    assert torch.allclose(ours[inner], torch.from_numpy(warped).permute(2, 0, 1)[inner], atol=2.0)


@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
def test_heatmaps_move_as_the_joints_in_the_picture_do(alignment: str) -> None:
    """A joint of the easy crop lies on the hard heatmap where the hard crop shows it."""
    stride, heatmap = 4, (SIZE[0] // 4, SIZE[1] // 4)
    views = HardViews(rotation=20, scale=0.2, alignment=alignment)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(3)
    joints = torch.tensor([24.0, 32.0]) + (torch.rand(20, 1, 2, generator=generator) - 0.5) * torch.tensor([20.0, 28.0])
    turns = views.draw_turns(20, generator, torch.device("cpu"))
    centre = torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2])
    moved = torch.einsum("bij,bkj->bki", torch.linalg.inv(turns), joints - centre) + centre
    visible = torch.full((20, 1), 2)
    maps = encode(input_to_heatmap(joints, SIZE, heatmap, alignment), visible, heatmap, 1.5)  # pyright: ignore
    hard, _ = decode(views.turn(maps, turns, SIZE), refine="parabola")
    wanted = input_to_heatmap(moved, SIZE, heatmap, alignment)  # pyright: ignore[reportArgumentType]
    inside = ((wanted > 1) & (wanted < torch.tensor([heatmap[1] - 2.0, heatmap[0] - 2.0]))).all(-1)
    assert inside.sum() > 10
    assert (hard - wanted)[inside].norm(dim=-1).max() < 0.35
    assert (hard - wanted)[inside].norm(dim=-1).mean() < 0.12
    assert stride * heatmap[0] == SIZE[0]


def test_published_turn_shears_crops_that_are_not_square() -> None:
    """In coordinates normalised by width and height a quarter turn of a tall crop is no turn of the picture."""
    quarter = turn_matrices(torch.tensor([math.pi / 2]), torch.ones(1))
    image = pictures(1, *SIZE).float()
    ours = HardViews().turn(image, quarter, SIZE)
    published = HardViews(compat=True).turn(image, quarter, SIZE)
    column = ours[0, :, :, 24]
    assert (published != 0).float().mean() > 0.99  # stretched to fill the crop
    assert (ours == 0).float().mean() > 0.2  # the narrow side does not reach the ends
    assert column.abs().sum() > 0


def test_no_turn_is_the_crop_itself() -> None:
    views = HardViews(rotation=0, scale=0)
    turns = views.draw_turns(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    image = pictures(2, *SIZE).float()
    assert torch.allclose(views.turn(image, turns, SIZE), image, atol=1e-2)
