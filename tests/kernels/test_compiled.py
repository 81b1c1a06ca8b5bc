"""What is compiled is the plain definitions, each as one graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels import ops
from dinoforge.kernels.types import Kept, Targets, Term
from dinoforge.models.layers import Block
from dinoforge.models.stochastic_depth import subset_of
from dinoforge.models.wanted import narrowing_to

GROUPS = ((4, 5), (6, 3))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(function):
    """Compiled; a break in the graph is an error."""
    return torch.compile(function, backend="eager", fullgraph=True)


def make_block(swiglu: bool) -> Block:
    torch.manual_seed(1)
    block = Block(8, 2, 16, swiglu=swiglu, layerscale=1.0, qkv_bias=True, proj_bias=True, ffn_bias=True)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "subset", "narrowed"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_block(swiglu, kind, dtype):
    attn = [Kept(torch.tensor([2, 0, 3]), 4 / 3), Kept(torch.tensor([5]), 6.0)]
    ffn = [Kept(torch.tensor([1]), 4.0), Kept(torch.tensor([4, 0]), 3.0)]
    settings = {}
    if kind != "all":
        settings = {"keep_attn": subset_of(attn, GROUPS, CPU), "keep_ffn": subset_of(ffn, GROUPS, CPU)}
    if kind == "narrowed":
        settings["narrowing"] = narrowing_to(torch.tensor([0, 5, 10, 23]), GROUPS, attn, ffn, CPU)
    block = make_block(swiglu)
    results = []
    for call in (block, whole(block)):
        block.zero_grad()
        x = torch.randn(38, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), ops.using("plain"):
            out = call(x, GROUPS, **settings)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_and_losses(dtype, kind):
    scratch = ops.Scratch()

    def losses(z: Tensor, g: Tensor, v: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        logits = ops.teacher_logits(teacher, g, v, 0.1, scratch=scratch)
        made: Targets = ops.centering(logits, center, 0.1) if kind == "centering" else ops.sinkhorn_knopp(logits)
        term = Term(z, made, (slice(0, 6), slice(6, 12)), torch.full((6,), 0.1), 0.1)
        total, _ = ops.cross_entropy([term], g, v, scratch)
        return total

    results = []
    for call in (losses, whole(losses)):
        torch.manual_seed(0)
        z = F.normalize(torch.randn(3, 6, 4), dim=-1).requires_grad_()
        g, v = torch.ones(20, 1, requires_grad=True), torch.randn(20, 4, requires_grad=True)
        teacher = F.normalize(torch.randn(12, 4), dim=-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), ops.using("plain"):
            total = call(z, g, v, teacher, torch.zeros(20))
        total.backward()
        results.append([total.detach(), z.grad, g.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_is_the_plain_one_whatever_is_asked_for(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a fast twin in a graph")

    monkeypatch.setattr("dinoforge.kernels.attention.AttentionOnCpu.apply", refuse)
    monkeypatch.setattr("dinoforge.kernels.linear.NormLinear.apply", refuse)
    with ops.using("fast"):
        whole(make_block(swiglu=False))(torch.randn(38, 8), GROUPS)
