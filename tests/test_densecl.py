from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poserelay.errors import UserError
from pretrain.densecl import DenseCL

from .test_moco import naive_head, naive_info_nce, unit
from .test_mscl import CHANNELS, TinyBackbone, two_views


def build(**more) -> DenseCL:
    torch.manual_seed(0)
    settings = {"width": 6, "hidden_width": 7, "queue_size": 12, "momentum": 0.9, "dense_weight": 0.3, **more}
    model = DenseCL(TinyBackbone(), CHANNELS, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def naive_losses(model: DenseCL, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 1 and Eq. 2, place by place; returns both losses, the pictures' keys and the mean of their places' keys."""
    f1 = model.backbone(view1)[-1].flatten(2)  # [B, C, S]
    with torch.no_grad():
        f2 = model.key_backbone(view2)[-1].flatten(2)
        k = unit(naive_head(model.key_heads.whole, f2.mean(2)))
    q = unit(naive_head(model.heads.whole, f1.mean(2)))
    whole = naive_info_nce(q, k, model.queue.keys, 0.2)
    queries, positives, mean_keys = [], [], []
    for picture in range(len(f1)):
        with torch.no_grad():
            keys = naive_head(model.key_heads.dense, f2[picture].T)
        mean_keys.append(unit(keys.mean(0)))
        for place in range(f1.shape[2]):
            likeness = [unit(f1[picture, :, place].detach()) @ unit(f2[picture, :, j]) for j in range(f2.shape[2])]
            best = max(range(len(likeness)), key=lambda j: likeness[j])
            queries.append(unit(naive_head(model.heads.dense, f1[picture, :, place])))
            positives.append(unit(keys[best]))
    dense = naive_info_nce(torch.stack(queries), torch.stack(positives), model.dense_queue.keys, 0.2)
    return whole, dense, k, torch.stack(mean_keys)


def test_loss_and_gradients_are_those_of_equations_1_to_3() -> None:
    model, (view1, view2) = build(), two_views()
    whole, dense, keys, mean_keys = naive_losses(model, view1, view2)
    expected = 0.7 * whole + 0.3 * dense
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, parameters)
    comparison = model.compare(model(view1, view2))
    assert abs(comparison.loss - expected) < 1e-9
    torch.testing.assert_close(comparison.terms, torch.stack([whole, dense]), rtol=1e-9, atol=1e-9)
    for gradient, reference in zip(torch.autograd.grad(comparison.loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.queue.keys[:5], keys)
    torch.testing.assert_close(model.dense_queue.keys[:5], mean_keys)


def test_the_dense_loss_waits_for_the_warm_up() -> None:
    model, views = build(warmup_steps=2), two_views()
    for step in range(4):
        comparison = model.compare(model(*views))
        whole, dense = comparison.terms
        weight = 0.0 if step < 2 else 0.3
        torch.testing.assert_close(comparison.loss, (1 - weight) * whole + weight * dense)
        model.after_step()


def test_the_momentum_encoder_follows() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.after_step()
    for name, value in model.named_parameters():
        if name.startswith("key_"):
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * before[name.removeprefix("key_")])


def test_an_impossible_weight_is_refused() -> None:
    with pytest.raises(UserError, match="dense_weight is 2"):
        build(dense_weight=2.0)
