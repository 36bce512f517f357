from __future__ import annotations

import torch
from torch import Tensor

from pretrain.mscl import MSCL
from pretrain.simsiam import SimSiam

from .test_mscl import CHANNELS, TinyBackbone, naive_mapping, naive_prediction, two_views


def build() -> SimSiam:
    torch.manual_seed(0)
    model = SimSiam(TinyBackbone(), CHANNELS, width=8, prediction_width=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def naive_distance(p: Tensor, z: Tensor) -> Tensor:
    """D of SimSiam's Algorithm 1, picture by picture, with the gradient stopped at z."""
    total = torch.zeros((), dtype=p.dtype)
    for prediction, target in zip(p, z.detach(), strict=True):
        total = total - (prediction / prediction.norm() * (target / target.norm())).sum()
    return total / len(p)


def test_loss_and_gradients_are_those_of_algorithm_1() -> None:
    model, (view1, view2) = build(), two_views()
    z = [naive_mapping(model.projection_head, model.backbone(view)[-1].flatten(2).mean(2)) for view in (view1, view2)]
    p = [naive_prediction(model.prediction_head, projection) for projection in z]
    expected = naive_distance(p[0], z[1]) / 2 + naive_distance(p[1], z[0]) / 2
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    comparison = model.compare(model(view1, view2))
    assert abs(comparison.loss - expected) < 1e-9
    for gradient, reference in zip(torch.autograd.grad(comparison.loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(comparison.outputs[0], z[0])


def test_mscl_by_settings_alone_is_simsiam_bit_by_bit() -> None:
    simsiam, views = build(), two_views()
    settings = {"levels": (3,), "loss_weights": (1.0,), "fusion": "none", "pool": "mean"}
    mscl = MSCL(TinyBackbone(), CHANNELS, width=8, prediction_width=4, **settings).double()
    names = {"mapping_heads.0": "projection_head", "prediction_heads.0": "prediction_head", "backbone": "backbone"}
    state = simsiam.state_dict()
    for theirs, ours in names.items():
        part = {name.removeprefix(f"{ours}."): v for name, v in state.items() if name.startswith(f"{ours}.")}
        mscl.get_submodule(theirs).load_state_dict(part)
    assert len(mscl.state_dict()) == len(state)
    one, other = simsiam.compare(simsiam(*views)), mscl.compare(mscl(*views))
    assert torch.equal(one.loss, other.loss)
    one.loss.backward()
    other.loss.backward()
    for theirs, ours in names.items():
        pairs = zip(mscl.get_submodule(theirs).parameters(), simsiam.get_submodule(ours).parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # pyright: ignore[reportArgumentType]
    assert [p.shape for p in mscl.predictors()] == [p.shape for p in simsiam.predictors()]
