"""Heads against the same operations written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from poserelay.errors import UserError
from poserelay.heads import CCMHead, DeconvHead, HRNetHead
from poserelay.heads.ccm import ContextMixer


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


def norm(x: Tensor, state: dict[str, Tensor], name: str, *, training: bool) -> Tensor:
    mean, variance = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
        if training
        else (state[f"{name}.running_mean"], state[f"{name}.running_var"])
    )
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def equation_4(x: Tensor, state: dict[str, Tensor], *, se: bool, hdc: bool, upsample: bool, training: bool) -> Tensor:
    """Eq. 1-4 as they are printed: the residual branch upsamples, then convolves."""
    mixed = x
    if hdc:
        branches = []
        for number, dilation in enumerate((1, 2, 3, 4)):
            weight = state[f"dilated.{number}.0.weight"]
            branch = functional.conv2d(x, weight, padding=dilation, dilation=dilation)
            branches.append(norm(branch, state, f"dilated.{number}.1", training=training).clamp(min=0))
        mixed = torch.cat(branches, 1)
    if upsample:
        mixed = naive_deconvolution(mixed, state["deconv.weight"], 1, (2 * x.shape[2], 2 * x.shape[3]))
    else:
        mixed = functional.conv2d(mixed, state["deconv.weight"], padding=1)
    mixed = norm(mixed, state, "deconv_norm", training=training)
    if se:
        pooled = x.mean((2, 3))
        hidden = (pooled @ state["se.1.weight"][..., 0, 0].T + state["se.1.bias"]).clamp(min=0)
        alpha = 1 / (1 + torch.exp(-(hidden @ state["se.3.weight"][..., 0, 0].T + state["se.3.bias"])))
        mixed = mixed * alpha[..., None, None]
    if se or hdc:
        up = functional.interpolate(x, scale_factor=2, mode="bilinear") if upsample else x
        residual = torch.einsum("bihw,oi->bohw", up, state["residual.weight"][..., 0, 0])
        mixed = mixed + norm(residual, state, "residual_norm", training=training)
    return mixed.clamp(min=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize(("se", "hdc"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_context_mixer_is_equations_1_to_4(se: bool, hdc: bool, upsample: bool, training: bool) -> None:
    torch.manual_seed(1)
    mixer = ContextMixer(6, 8, se=se, hdc=hdc, upsample=upsample).double().train(training)
    for value in mixer.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if value.ndim == 1 else value.normal_()
    x = torch.randn(3, 6, 5, 4).double()
    state = {name: value.clone() for name, value in mixer.state_dict().items()}
    expected = equation_4(x, state, se=se, hdc=hdc, upsample=upsample, training=training)
    torch.testing.assert_close(mixer(x), expected)


def test_ccm_cascades_mixers_and_supervises_a_second_decoder_on_the_penultimate_stage() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 7, 2, 2)]
    head = CCMHead([5, 6, 7], 3, channels=(8, 4), upsampling_mixers=1).eval()
    assert head.upsampling == 2
    assert head(maps).shape == (2, 3, 4, 4)
    assert head.auxiliary is not None
    assert head.auxiliary([maps[1]]).shape == (2, 3, 8, 8)
    names = {name.removeprefix("auxiliary.") for name in head.state_dict() if name.startswith("auxiliary.")}
    assert names == {name for name in head.state_dict() if not name.startswith("auxiliary.")}
    torch.testing.assert_close(head(maps), head.final_layer(head.mixers[1](head.mixers[0](maps[-1]))))
    assert CCMHead([5], 3, channels=(4,)).auxiliary is not None  # HRNet's only branch


def test_ccm_starts_from_a_gaussian() -> None:
    torch.manual_seed(0)
    head = CCMHead([64, 128], 17)
    for name, value in head.state_dict().items():
        if value.ndim == 4:
            assert value.std().item() == pytest.approx(0.001, rel=0.1), name
            assert abs(value.mean().item()) < 2e-4, name
        elif name.endswith("bias"):
            assert (value == 0).all(), name


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"channels": []}, "channels is"),
        ({"channels": [6]}, "multiple of 4"),
        ({"channels": [8, 8], "upsampling_mixers": 3}, "upsampling_mixers is 3"),
    ],
)
def test_widths_that_cannot_be_are_told(kwargs: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CCMHead([8, 8], 3, **kwargs)
