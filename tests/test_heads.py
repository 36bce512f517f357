"""Heads against the same operations written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from poserelay.heads import DeconvHead, HRNetHead


def naive_deconvolution(x: Tensor, weight: Tensor, padding: int, size: tuple[int, int]) -> Tensor:
    """Spread every input pixel through the kernel, stride 2, then cut the padding off."""
    batch, _, height, width = x.shape
    kernel = weight.shape[-1]
    canvas = x.new_zeros(batch, weight.shape[1], 2 * height + kernel + 2, 2 * width + kernel + 2)
    for row in range(height):
        for column in range(width):
            patch = torch.einsum("bi,iokl->bokl", x[:, :, row, column], weight)
            canvas[:, :, 2 * row : 2 * row + kernel, 2 * column : 2 * column + kernel] += patch
    return canvas[:, :, padding : padding + size[0], padding : padding + size[1]]


@pytest.mark.parametrize(("kernel", "padding"), [(4, 1), (3, 1), (2, 0)])
def test_simple_doubles_the_coarsest_map_as_a_loop_does(kernel: int, padding: int) -> None:
    torch.manual_seed(kernel)
    head = DeconvHead([3, 7], 5, deconv_channels=(6, 4), deconv_kernel=kernel).double().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    state = head.state_dict()
    maps = [torch.randn(2, 3, 8, 6).double(), torch.randn(2, 7, 4, 3).double()]
    x, size = maps[-1], (4, 3)
    for layer in (0, 3):
        size = (2 * size[0], 2 * size[1])
        x = naive_deconvolution(x, state[f"deconv_layers.{layer}.weight"], padding, size)
        scale, offset = state[f"deconv_layers.{layer + 1}.weight"], state[f"deconv_layers.{layer + 1}.bias"]
        x = (x / (1 + 1e-5) ** 0.5 * scale[:, None, None] + offset[:, None, None]).clamp(min=0)
    expected = torch.einsum("bihw,oi->bohw", x, state["final_layer.weight"][..., 0, 0])
    expected = expected + state["final_layer.bias"][:, None, None]
    torch.testing.assert_close(head(maps), expected)
    assert head.upsampling == 4


def test_simple_has_the_names_and_widths_of_the_papers_code() -> None:
    head = DeconvHead([64, 128, 256, 512], 17)
    shapes = {name: tuple(value.shape) for name, value in head.named_parameters()}
    assert shapes == {
        "deconv_layers.0.weight": (512, 256, 4, 4),
        "deconv_layers.1.weight": (256,),
        "deconv_layers.1.bias": (256,),
        "deconv_layers.3.weight": (256, 256, 4, 4),
        "deconv_layers.4.weight": (256,),
        "deconv_layers.4.bias": (256,),
        "deconv_layers.6.weight": (256, 256, 4, 4),
        "deconv_layers.7.weight": (256,),
        "deconv_layers.7.bias": (256,),
        "final_layer.weight": (17, 256, 1, 1),
        "final_layer.bias": (17,),
    }


def test_simple_starts_as_the_papers_code() -> None:
    torch.manual_seed(0)
    state = DeconvHead([512], 17).state_dict()
    for name in ("deconv_layers.0", "deconv_layers.3", "deconv_layers.6", "final_layer"):
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.001, rel=0.05)
        assert abs(state[f"{name}.weight"].mean().item()) < 1e-4
    assert (state["final_layer.bias"] == 0).all()
    assert all((state[f"deconv_layers.{layer}.weight"] == 1).all() for layer in (1, 4, 7))


def test_hrnet_weighs_the_top_branch_alone() -> None:
    torch.manual_seed(0)
    head = HRNetHead([32, 64], 17)
    assert set(head.state_dict()) == {"final_layer.weight", "final_layer.bias"}
    assert (head.final_layer.bias == 0).all()
    assert head.final_layer.weight.std().item() == pytest.approx(0.001, rel=0.15)
    maps = [torch.randn(2, 32, 8, 6), torch.full((2, 64, 4, 3), torch.nan)]
    expected = functional.linear(maps[0].movedim(1, -1), head.final_layer.weight[:, :, 0, 0]).movedim(-1, 1)
    torch.testing.assert_close(head(maps), expected)
