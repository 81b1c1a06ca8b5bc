"""Operators outside of PyTorch's public interface: steps go on without them."""

import pytest
import torch
from torch import nn

from dinoforge.kernels import ops, private, products
from dinoforge.kernels.attention import AttentionOnCpu, HalfAttentionOnCpu
from dinoforge.kernels.linear import NormLinear, ScaledLinear

NAMES = [
    "linear_pointwise",
    "flash_attention",
    "flash_attention_backward",
    "softmax_backward",
    "layer_norm_backward",
    "gelu_backward",
]
TWINS = [AttentionOnCpu, HalfAttentionOnCpu, NormLinear, ScaledLinear]


def step(dtype: torch.dtype) -> list[torch.Tensor]:
    """Every operation that has such a twin, with its gradients."""
    torch.manual_seed(0)
    norm, wide, narrow = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)
    x, scale = torch.randn(128, 24, requires_grad=True), torch.full((24,), 0.1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        attended = ops.attention(ops.norm_linear(x, norm, wide), ((4, 20), (6, 8)), 2)
        out = ops.scaled_linear(attended, narrow, scale, gelu=True)
    out.float().square().sum().backward()
    parameters = [*norm.parameters(), *wide.parameters(), *narrow.parameters()]
    return [out.detach(), *(tensor.grad for tensor in (x, scale, *parameters))]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_found_here(name):
    """On the version that the tests run on, so that a fast twin is not lost unseen."""
    if name == "linear_pointwise" and not products._BY_ONEDNN:
        pytest.skip("oneDNN's linear layer is for x86")
    assert getattr(private, name)() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_a_step_without(name, dtype, monkeypatch):
    """Without one of them, and without any."""
    expected = step(dtype)
    for missing in NAMES if name is None else [name]:
        monkeypatch.setattr(private, missing, lambda: None)
    if name is None:

        def refuse(*arguments):
            raise AssertionError("a fast twin that needs what is not there")

        for twin in TWINS[:3]:
            monkeypatch.setattr(twin, "apply", refuse)
    for ours, theirs in zip(step(dtype), expected, strict=True):
        # As between fast and plain, see test_ops.py; the gradients here come through five roundings.
        bound = 1e-5 if dtype is torch.float32 else 2e-2
        assert (ours.float() - theirs.float()).norm() <= bound * theirs.float().norm()


def absent():
    return torch.ops.aten.an_operator_of_another_version


def test_what_is_missing_or_takes_other_arguments_is_none():
    assert private.tried(absent, lambda op: op()) is None
    assert private.tried(lambda: torch.relu, lambda op: op(torch.ones(1), "none", 3)) is None
    assert private.tried(lambda: torch.mm, lambda op: op(torch.ones(2, 3), torch.ones(2, 3))) is None
    assert private.tried(lambda: torch.mm, lambda op: op(torch.ones(2, 2), torch.ones(2, 2))) is torch.mm


def test_a_try_is_not_seen_by_whoever_counts_operations():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert private.tried(lambda: torch.mm, lambda op: op(torch.ones(2, 2), torch.ones(2, 2))) is torch.mm
    assert counter.get_total_flops() == 0
