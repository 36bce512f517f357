from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from poserelay.errors import UserError
from pretrain.moco import KeyShuffle, MoCo, Queue, info_nce

from .processes import finish, ranks, start
from .test_mscl import CHANNELS, TinyBackbone, two_views


def build(**more) -> MoCo:
    torch.manual_seed(0)
    model = MoCo(
        TinyBackbone(), CHANNELS, **{"width": 6, "hidden_width": 7, "queue_size": 12, "momentum": 0.9, **more}
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def naive_head(head: nn.Module, x: Tensor) -> Tensor:
    w = dict(head.named_parameters())
    return (x @ w["layers.0.weight"].T + w["layers.0.bias"]).clamp(min=0) @ w["layers.2.weight"].T + w["layers.2.bias"]


def naive_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's Eq. 1, query by query."""
    total = torch.zeros((), dtype=query.dtype)
    for q, k in zip(query, key, strict=True):
        positive = torch.exp(q @ k / temperature)
        total = total - torch.log(positive / (positive + sum(torch.exp(q @ n / temperature) for n in queue)))
    return total / len(query)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def test_loss_and_gradients_are_those_of_equation_1_over_three_steps() -> None:
    model = build()
    (view1, view2), parameters = two_views(), [p for p in model.parameters() if p.requires_grad]
    keys = {name: v.clone() for name, v in model.state_dict().items() if name.startswith("key_")}
    queue = model.queue.keys.clone()
    for step in range(3):
        q = unit(naive_head(model.projection_head, model.backbone(view1)[-1].flatten(2).mean(2)))
        with torch.no_grad():
            k = unit(naive_head(model.key_projection_head, model.key_backbone(view2)[-1].flatten(2).mean(2)))
        expected = naive_info_nce(q, k, queue, 0.2)
        expected_gradients = torch.autograd.grad(expected, parameters)
        comparison = model.compare(model(view1, view2))
        assert abs(comparison.loss - expected) < 1e-9
        gradients = torch.autograd.grad(comparison.loss, parameters)
        for gradient, reference in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
        model.after_step()
        for name, value in model.named_parameters():
            if not name.startswith("key_"):
                keys[f"key_{name}"] = 0.9 * keys[f"key_{name}"] + 0.1 * value.detach()
                torch.testing.assert_close(model.state_dict()[f"key_{name}"], keys[f"key_{name}"])
        for row, key in enumerate(k):
            queue[(5 * step + row) % 12] = key
        torch.testing.assert_close(model.queue.keys, queue)


@given(batch=st.integers(1, 6), width=st.integers(1, 5), negatives=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_info_nce_is_lightlys_with_a_memory_bank(batch: int, width: int, negatives: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = torch.randn(2, batch, width)
    peer = NTXentLoss(0.2, memory_bank_size=(negatives, width))
    bank = peer.memory_bank.bank.clone()
    torch.testing.assert_close(info_nce(unit(query), unit(key), bank, 0.2), peer(query, key), rtol=1e-5, atol=1e-5)


def test_the_queue_is_lightlys_bank_and_survives_a_checkpoint() -> None:
    queue, bank = Queue(12, 5), MemoryBankModule((12, 5))
    bank.bank = queue.keys.clone()
    for _ in range(5):
        keys = torch.randn(4, 5)
        bank(keys, update=True)
        queue.enqueue(keys)
        assert torch.equal(queue.keys, bank.bank)
    assert len(bank.state_dict()) == 0  # why the queue is our own
    other = Queue(12, 5)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, queue.keys)
    assert other.oldest == queue.oldest == 20 % 12


def test_no_gradient_reaches_the_key_encoder_and_its_norms_are_its_own() -> None:
    model, views = build(), two_views()
    before = model.key_backbone.state_dict()["stages.0.1.running_mean"].clone()
    model.compare(model(*views)).loss.backward()
    assert all(p.grad is None for p in model.key_backbone.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert not torch.equal(before, model.key_backbone.state_dict()["stages.0.1.running_mean"])
    assert model.loss_range == (math.log(13), 0.0)


@pytest.mark.parametrize("wrong", [{"queue_size": 0}, {"momentum": 1.5}, {"temperature": 0.0}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(**wrong)


def shuffled(arguments: list[str]) -> int:
    """One process of two: deal pictures out, note who was normalised together, bring the keys home."""
    rank, folder = int(arguments[0]), Path(arguments[1])
    torch.distributed.init_process_group("gloo")
    shuffle, seen = KeyShuffle(), []
    for _ in range(3):
        own = torch.arange(4.0).view(4, 1) + 10 * rank
        share = shuffle.apart(own)
        seen.append(share.flatten())
        assert torch.equal(shuffle.together(share * 2), own * 2)
    queue = Queue(8, 1)
    queue.enqueue(torch.full((4, 1), float(rank)))
    torch.save({"seen": torch.stack(seen), "queue": queue.keys}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


def test_keys_are_shuffled_between_processes_and_come_home(tmp_path: Path) -> None:
    processes = [
        start(shuffled, [str(rank), str(tmp_path)], tmp_path / f"log{rank}", environment)
        for rank, environment in enumerate(ranks(2))
    ]
    for rank, process in enumerate(processes):
        assert finish(process) == 0, (tmp_path / f"log{rank}").read_text()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    everyone = [0, 1, 2, 3, 10, 11, 12, 13]
    for one, other in zip(first["seen"], second["seen"], strict=True):
        assert sorted([*one.tolist(), *other.tolist()]) == everyone
        assert set(one.tolist()) not in ({0, 1, 2, 3}, {10, 11, 12, 13})
    assert not torch.equal(first["seen"][0], first["seen"][1])
    assert first["queue"].flatten().tolist() == second["queue"].flatten().tolist() == [0.0] * 4 + [1.0] * 4
