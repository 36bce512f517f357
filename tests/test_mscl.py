from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from poserelay.errors import UserError
from pretrain.mscl import MSCL, FeaturePyramid, LevelOutputs, mscl_loss

CHANNELS = (3, 4, 5, 6)


class TinyBackbone(nn.Module):
    """Four levels with a stride of 2 between them, BN included."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise((3, *CHANNELS))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


def build(**settings_) -> MSCL:
    torch.manual_seed(0)
    model = MSCL(TinyBackbone(), CHANNELS, **{"width": 8, "prediction_width": 4, **settings_}).double()
    with torch.no_grad():  # biases and BN weights away from 0 and 1, so that a forgotten one shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def two_views() -> tuple[Tensor, Tensor]:
    both = torch.randn(2, 5, 3, 44, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return both[0], both[1]


def naive_convolution(x: Tensor, convolution: nn.Module) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    kernel = weight.shape[-1]
    padded = torch.zeros(*x.shape[:2], x.shape[2] + kernel - 1, x.shape[3] + kernel - 1, dtype=x.dtype)
    start = kernel // 2
    padded[:, :, start : start + x.shape[2], start : start + x.shape[3]] = x
    out = torch.zeros(x.shape[0], weight.shape[0], *x.shape[2:], dtype=x.dtype) + bias[:, None, None]
    for dy in range(kernel):
        for dx in range(kernel):
            patch = padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
            out = out + torch.einsum("bchw,oc->bohw", patch, weight[:, :, dy, dx])
    return out


def naive_max_pool(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    rows = []
    for y in range(0, height, 2):
        row = []
        for left in range(0, width, 2):
            window = x[:, :, max(0, y - 1) : y + 2, max(0, left - 1) : left + 2]
            row.append(window.flatten(2).max(2).values)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def naive_nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows = [math.floor(y * x.shape[2] / height) for y in range(height)]
    columns = [math.floor(c * x.shape[3] / width) for c in range(width)]
    return x[:, :, rows][:, :, :, columns]


def naive_batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    x = (x - x.mean(0)) / torch.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
    return x if weight is None else x * weight + bias


def naive_mapping(head: nn.Module, x: Tensor) -> Tensor:
    """Eq. 3: twice FC-BN-ReLU, then FC-BN without affine."""
    w = dict(head.named_parameters())
    x = naive_batch_norm(x @ w["layers.0.weight"].T, w["layers.1.weight"], w["layers.1.bias"]).clamp(min=0)
    x = naive_batch_norm(x @ w["layers.3.weight"].T, w["layers.4.weight"], w["layers.4.bias"]).clamp(min=0)
    return naive_batch_norm(x @ w["layers.6.weight"].T)


def naive_prediction(head: nn.Module, x: Tensor) -> Tensor:
    """Eq. 4: FC-BN-ReLU, FC."""
    w = dict(head.named_parameters())
    x = naive_batch_norm(x @ w["layers.0.weight"].T, w["layers.1.weight"], w["layers.1.bias"]).clamp(min=0)
    return x @ w["layers.3.weight"].T + w["layers.3.bias"]


def naive_loss(model: MSCL, views: tuple[Tensor, Tensor], weights: list[float]) -> tuple[Tensor, list[Tensor]]:
    """Eq. 1-7, level by level and picture by picture, as readings 1-6 of the paper take them."""
    pyramid = model.pyramid
    assert pyramid is not None
    z, p = [], []
    for view in views:
        f = model.backbone(view)
        z.append([])
        p.append([])
        for i in range(4):
            fused = naive_convolution(f[i], pyramid.lateral[i])
            if i < 3:
                deeper = naive_convolution(f[i + 1], pyramid.lateral[i + 1])
                fused = fused + naive_nearest(deeper, *fused.shape[2:])
            fused = naive_convolution(naive_max_pool(fused), pyramid.convolution[i])
            vector = fused.flatten(2).max(2).values
            z[-1].append(naive_mapping(model.mapping_heads[i], vector))
            p[-1].append(naive_prediction(model.prediction_heads[i], z[-1][-1]))

    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        target = target.detach()
        terms = [-(a / a.norm()) @ (b / b.norm()) for a, b in zip(prediction, target, strict=True)]
        return sum(terms, torch.zeros((), dtype=prediction.dtype)) / len(terms)

    levels = [0.5 * distance(p[0][i], z[1][i]) + 0.5 * distance(p[1][i], z[0][i]) for i in range(4)]
    total = sum((w / sum(weights) * level for w, level in zip(weights, levels, strict=True)), torch.zeros(()))
    return total, levels


def test_loss_and_gradients_are_those_of_the_equations():
    model, views, weights = build(), two_views(), [1.0, 2.0, 2.0, 5.0]
    expected, expected_levels = naive_loss(model, views, weights)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    total, per_level = mscl_loss(model(*views), weights)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(per_level, torch.stack(expected_levels), rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(total, list(model.parameters()))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert reference is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_the_recursive_pyramid_adds_the_deeper_sum():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((2, 3, 4), 5, fusion="recursive").double()
    maps = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((2, 12), (3, 6), (4, 3))]
    sums = [naive_convolution(f, lateral) for f, lateral in zip(maps, pyramid.lateral, strict=True)]
    sums[1] = sums[1] + naive_nearest(sums[2], 6, 6)
    sums[0] = sums[0] + naive_nearest(sums[1], 12, 12)
    for vector, fused, convolution in zip(pyramid(maps), sums, pyramid.convolution, strict=True):
        expected = naive_convolution(naive_max_pool(fused), convolution).flatten(2).max(2).values
        torch.testing.assert_close(vector, expected)


def test_convolving_first_and_mean_pooling():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((2,), 3, convolve_first=True, pool="mean").double()
    f = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    fused = naive_convolution(naive_convolution(f, pyramid.lateral[0]), pyramid.convolution[0])
    torch.testing.assert_close(pyramid([f])[0], naive_max_pool(fused).flatten(2).mean(2))


@pytest.mark.parametrize(("convolve_first", "gmacs"), [(False, 7.3), (True, 14.7)])
def test_cost_per_view_is_the_one_the_paper_clocked(convolve_first: bool, gmacs: float):
    with torch.device("meta"):
        pyramid = FeaturePyramid((256, 512, 1024, 2048), convolve_first=convolve_first)
        maps = [torch.empty(1, 256 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]
    with FlopCounterMode(display=False) as counter:
        pyramid(maps)
    resnet50 = 4.1
    assert counter.get_total_flops() / 2e9 + resnet50 == pytest.approx(gmacs, abs=0.06)


def test_no_gradient_reaches_the_target():
    p1, z1, p2, z2 = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(4))
    total, _ = mscl_loss([LevelOutputs(p1, z1, p2, z2)], [1.0])
    total.backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p2.grad is not None
    assert torch.autograd.gradcheck(lambda p: mscl_loss([LevelOutputs(p, z1, p2, z2)], [1.0])[0], p1)


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.floats(0.1, 50), st.integers(0, 100), st.floats(0.1, 20)
)
@settings(max_examples=30, deadline=None)
def test_loss_ignores_the_scale_of_weights_and_outputs(weights: list[float], scale: float, seed: int, stretch: float):
    generator = torch.Generator().manual_seed(seed)
    levels = [
        LevelOutputs(*torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)) for _ in range(len(weights))
    ]
    total, per_level = mscl_loss(levels, weights)
    scaled, _ = mscl_loss(
        [LevelOutputs(*(stretch * x for x in level)) for level in levels], [scale * w for w in weights]
    )
    torch.testing.assert_close(total, scaled)
    assert per_level.min() - 1e-12 <= total <= per_level.max() + 1e-12


def test_loss_is_minus_one_where_predictions_are_perfect_and_symmetric():
    z1, z2 = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    total, per_level = mscl_loss([LevelOutputs(3 * z2, z1, 0.5 * z1, z2)] * 2, [1, 3])
    torch.testing.assert_close(total, torch.tensor(-1.0))
    torch.testing.assert_close(per_level, torch.full((2,), -1.0))
    model, (view1, view2) = build(), two_views()
    forth, _ = mscl_loss(model(view1, view2), [1, 2, 2, 5])
    back, _ = mscl_loss(model(view2, view1), [1, 2, 2, 5])
    torch.testing.assert_close(forth, back)


def test_concatenated_views_share_their_batch_statistics():
    views = two_views()
    separate, concatenated = build(), build(concatenate_views=True)
    apart, together = separate(*views), concatenated(*views)
    assert not torch.allclose(apart[0].z1, together[0].z1)
    torch.testing.assert_close(torch.cat([together[2].z1, together[2].z2]).mean(0), torch.zeros(8).double())
    torch.testing.assert_close(apart[2].z1.mean(0), torch.zeros(8).double())
    for one, other in zip(separate.eval()(*views), concatenated.eval()(*views), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
    concatenated.load_state_dict(separate.state_dict())
    for one, other in zip(separate(*views), concatenated(*views), strict=True):
        torch.testing.assert_close(tuple(one), tuple(other))


def test_without_fusion_a_level_is_pooled_and_mapped_as_it_is():
    model, views = build(levels=(1, 3), loss_weights=(1, 1), fusion="none", pool="mean"), two_views()
    outputs = model(*views)
    for level, output, head in zip((1, 3), outputs, model.mapping_heads, strict=True):
        vector = model.backbone(views[1])[level].mean((2, 3))
        torch.testing.assert_close(output.z2, naive_mapping(head, vector))


def test_shared_heads_serve_every_level():
    shared = build(shared_heads=True)
    assert len(shared.mapping_heads) == len(shared.prediction_heads) == 1
    assert len(shared(*two_views())) == 4
    assert len(build().mapping_heads) == 4


@pytest.mark.parametrize("levels", [(0, 4), (-1, 3), (1, 1), (3, 2), ()])
def test_levels_the_backbone_lacks_are_named(levels: tuple[int, ...]):
    with pytest.raises(UserError, match="levels 0 to 3"):
        build(levels=levels)


def test_shared_heads_over_unequal_levels_are_refused():
    with pytest.raises(UserError, match="shared_heads"):
        build(shared_heads=True, fusion="none")


@pytest.mark.parametrize("weights", [[1, 2], [1, 1, 1, -1], [0, 0, 0, 0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]):
    level = LevelOutputs(*torch.randn(4, 2, 3))
    with pytest.raises(UserError, match="loss_weights"):
        mscl_loss([level] * 4, weights)
