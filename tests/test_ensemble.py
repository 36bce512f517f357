"""Means of heatmaps by hand; maps of different strides, colours and alignments must name the same place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poserelay.checkpoint import describe, write_export
from poserelay.command import to_plain
from poserelay.config import Decoding, InputConfig, ModelConfig, Named
from poserelay.ensemble import Ensemble, load_models, resample
from poserelay.errors import UserError
from poserelay.heatmaps import decode, encode, heatmap_to_input, input_to_heatmap
from poserelay.inference import predict_images
from poserelay.keypoints import Skeleton
from poserelay.model import PoseModel, build_model, normalise

from .test_inference import BOXES, FIRST, SECOND, picture

SKELETON = Skeleton(name="blobs", joints=("red", "green", "blue"), sigmas=(0.1, 0.1, 0.1))
OTHER = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "color": "bgr"}


class Colours(nn.Module):
    """Joint k is the brightest place of colour k, found again in however the crop was preprocessed."""

    def __init__(self, stride: int, alignment: Any = "hrnet", skeleton: Skeleton = SKELETON, **fields: Any) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.refiner = None
        self.input = InputConfig(**{"height": 96, "width": 64, "alignment": alignment, **fields})
        self.stride = stride
        self.heatmap_size = 96 // stride, 64 // stride
        self.gain = nn.Parameter(torch.tensor(1.0))

    def preprocess(self, images: Tensor) -> Tensor:
        return normalise(images, self.input)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.input.mean, self.input.std))
        colours = images * std + mean
        colours = colours.flip(1) if self.input.color == "bgr" else colours
        if self.input.alignment == "udp":
            return self.gain * nn.functional.interpolate(
                colours, self.heatmap_size, mode="bilinear", align_corners=True
            )
        return self.gain * colours[..., :: self.stride, :: self.stride]


def together(*models: Any) -> Any:
    """An ensemble, of any type: inference asks for one model."""
    return Ensemble({f"{index}.safetensors": model for index, model in enumerate(models)}).eval()


def network(seed: int, *, joints: Sequence[str] = SKELETON.joints, deconvolutions: int = 1, **fields: Any) -> PoseModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        Named("timm", {"model": "test_resnet"}),
        Named("simple", {"deconv_channels": [8] * deconvolutions}),
        input=InputConfig(**{"height": 64, "width": 64, **fields}),
    )
    model = build_model(config, Skeleton("blobs", tuple(joints))).eval()
    nn.init.normal_(model.head.final_layer.weight, std=100)  # maps of about 1 that differ between crops
    return model


def export(path: Path, model: PoseModel) -> Path:
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
    return path


def crops(count: int) -> Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(noise, (64, 64), mode="bilinear") * 255).to(torch.uint8)


def test_the_mean_of_two_networks_by_hand(tmp_path: Path) -> None:
    """Each with its own colours, from their files."""
    one, two = network(0), network(1, **OTHER)
    files = [export(tmp_path / f"{name}.safetensors", model) for name, model in (("a", one), ("b", two))]
    images = crops(3)
    with torch.inference_mode():
        expected = (one(normalise(images, one.input)) + two(normalise(images, two.input))) / 2
        wrong = (one(normalise(images, one.input)) + two(normalise(images, one.input))) / 2
        loaded = load_models(files)
        found = loaded(loaded.preprocess(images))
    torch.testing.assert_close(found, expected)
    assert float((found - wrong).abs().max()) > 0.01
    assert not any(part.training for part in loaded.modules())
    assert (loaded.stride, loaded.heatmap_size) == (one.stride, one.heatmap_size)


def test_one_file_is_its_model(tmp_path: Path) -> None:
    file = export(tmp_path / "a.safetensors", network(0))
    images = crops(1)
    with torch.inference_mode():
        for paths in (file, str(file), [file]):
            model = load_models(paths)
            assert isinstance(model, PoseModel)
            torch.testing.assert_close(model(model.preprocess(images)), network(0)(normalise(images, model.input)))


def test_maps_of_two_strides_have_the_finer_size() -> None:
    coarse, fine = network(0), network(1, deconvolutions=2)
    images = crops(2)
    with torch.inference_mode():
        maps = together(coarse, fine)(images)
        assert torch.equal(maps, together(fine, coarse)(images))
        whole = fine(normalise(images, fine.input))
        coarser = coarse(normalise(images, coarse.input))
    assert maps.shape == whole.shape
    # where the coarse map has a pixel, its value counts as it is
    torch.testing.assert_close(maps[..., ::2, ::2], (whole[..., ::2, ::2] + coarser) / 2)
    ensemble = together(coarse, fine)
    assert (ensemble.stride, ensemble.heatmap_size) == (fine.stride, fine.heatmap_size)


SIZES = st.integers(2, 8)


@given(SIZES, SIZES, st.integers(1, 3), st.sampled_from(["hrnet", "udp"]), st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_resampling_equals_a_naive_loop(height: int, width: int, ratio: int, alignment: Any, seed: int) -> None:
    maps = torch.randn(2, height, width, generator=torch.Generator().manual_seed(seed)).double()
    size = (height * ratio, width * ratio)
    # The frames of the codec: a fine pixel to the input picture and on to the coarse map.
    input_size = (8 * size[0], 8 * size[1])
    places = torch.tensor([[x, y] for y in range(size[0]) for x in range(size[1])]).double()
    on_coarse = input_to_heatmap(
        heatmap_to_input(places, input_size, size, alignment), input_size, (height, width), alignment
    )

    def keys(t: float) -> float:
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    expected = []
    for x, y in on_coarse.tolist():
        x, y = min(x, width - 1), min(y, height - 1)
        total = torch.zeros(2).double()
        for row in range(-4, height + 4):
            for column in range(-4, width + 4):
                value = maps[:, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                total += keys(y - row) * keys(x - column) * value
        expected.append(total)
    torch.testing.assert_close(resample(maps, size, alignment).flatten(1), torch.stack(expected, 1))


@pytest.mark.parametrize("refine", ["parabola", "paraboloid", "dark"])
@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
def test_gaussians_keep_their_places(alignment: Any, refine: Any) -> None:
    """Encoded at the same input points on maps of stride 4 and 2, decoded to those points on their mean."""
    points = 40 + torch.rand(200, 1, 2, generator=torch.Generator().manual_seed(0)) * 60
    maps = []
    for size, sigma in (((48, 36), 2.0), ((96, 72), 4.0)):
        place = input_to_heatmap(points, (192, 144), size, alignment)
        maps.append(resample(encode(place, torch.ones(200, 1), size, sigma), (96, 72), alignment))
    for mean in (maps[0], torch.stack(maps).mean(0)):
        xy, _ = decode(mean, refine=refine)
        back = heatmap_to_input(xy, (192, 144), (96, 72), alignment)
        assert float((back - points).abs().mean()) < 0.08
        assert float((back - points).abs().max()) < 0.2


@pytest.mark.parametrize("alignment", ["hrnet", "udp"])
@pytest.mark.parametrize("flip", [False, True])
def test_mixed_members_find_the_joints_of_a_picture(alignment: str, flip: bool) -> None:
    """Strides 8 and 4, bgr and rgb: the joints are where either finds them, also in the mirror."""
    ensemble = together(Colours(8, alignment, **OTHER), Colours(4, alignment))
    image = picture((180, 240), FIRST, SECOND)
    decoding = Decoding(refine="parabola", blur=1.0, flip=flip)
    results = predict_images(ensemble, [image], [BOXES], decoding)
    found = np.array([record["keypoints"] for record in results]).reshape(2, 3, 3)
    coarse_pixel = 75 * 1.25 / (64 / 8)  # in image pixels
    np.testing.assert_allclose(found[..., :2], [FIRST, SECOND], atol=0.1 * coarse_pixel)
    assert found[..., 2].min() > 0.6


def test_the_flip_test_exchanges_paired_joints() -> None:
    """The stand-ins call a colour by its name also in the mirror, so paired joints mix with each other's maps."""
    paired = Skeleton(name="paired", joints=SKELETON.joints, flip_pairs=(("red", "green"),))
    ensemble = together(Colours(8, skeleton=paired), Colours(4, skeleton=paired))
    (result,) = predict_images(ensemble, [picture((180, 240), FIRST)], [BOXES[:1]], Decoding())
    scores = np.reshape(result["keypoints"], (3, 3))[:, 2]
    assert (scores[:2] < 0.7).all()
    assert scores[2] > 0.7


def test_models_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    others = [
        (Colours(4, skeleton=Skeleton("a", ("green", "red", "blue"))), "the second green, red, blue; give models"),
        (Colours(4, skeleton=Skeleton("a", ("red", "green"))), "joints red, green, blue, the second red, green; give"),
        (Colours(4, width=96), "input.width is 64 of the first and 96 of the second; give"),
        (Colours(4, "udp"), "input.alignment is hrnet of the first and udp of the second; give"),
    ]
    for other, problem in others:
        with pytest.raises(UserError) as caught:
            together(Colours(4), other)
        assert str(caught.value).startswith("0.safetensors and 1.safetensors: cannot be averaged: ")
        assert problem in str(caught.value)
    files = [export(tmp_path / f"{name}.safetensors", network(0, width=size)) for name, size in (("a", 64), ("b", 96))]
    with pytest.raises(UserError, match=rf"^{files[0]} and {files[1]}: cannot be averaged: input\.width"):
        load_models(files)
    paired = Skeleton(name="paired", joints=SKELETON.joints, flip_pairs=(("red", "green"),))
    with pytest.raises(UserError, match=r"flip_pairs of their skeletons differ \(blobs, paired\)"):
        together(Colours(4), Colours(4, skeleton=paired))


def test_a_file_counts_once(tmp_path: Path) -> None:
    file = export(tmp_path / "a.safetensors", network(0))
    (tmp_path / "link.safetensors").symlink_to(file)
    with pytest.raises(UserError, match=r"a\.safetensors: named twice; a model"):
        load_models([file, file])
    with pytest.raises(UserError, match=r"link\.safetensors: named twice \(the same file as .*a\.safetensors\)"):
        load_models([file, tmp_path / "link.safetensors"])
    with pytest.raises(UserError, match="none is named"):
        load_models([])
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        load_models([file, tmp_path / "gone.safetensors"])
