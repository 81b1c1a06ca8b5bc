import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinoforge.models.head import DINOHead, Prototypes


def make_head(nlayers=3):
    torch.manual_seed(nlayers)
    head = DINOHead(6, prototypes=10, bottleneck_dim=4, nlayers=nlayers, hidden_dim=8)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def library_head(head, nlayers):
    """The same from PyTorch's own layers."""
    layers = [head.mlp] if nlayers == 1 else [m for m in head.mlp if isinstance(m, nn.Linear)]
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 10, bias=False), dim=0)
    with torch.no_grad():
        last.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        last.parametrizations.weight.original1.copy_(head.last_layer.weight_v)

    def forward(x):
        for i, layer in enumerate(layers):
            x = F.linear(x, layer.weight, layer.bias)
            x = F.gelu(x) if i + 1 < len(layers) else x
        return last(x / x.norm(dim=-1, keepdim=True))

    return forward, last.parametrizations.weight


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_logits_and_gradients_are_those_of_weight_norm(nlayers):
    head = make_head(nlayers)
    forward, weight = library_head(head, nlayers)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = head(x), forward(x)
    assert ours.shape == (7, 10)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    theirs.square().sum().backward()
    torch.testing.assert_close(gradients.pop("last_layer.weight_g"), weight.original0.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients.pop("last_layer.weight_v"), weight.original1.grad, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, head.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_one_layer_is_a_linear_layer_under_the_official_name():
    assert {n for n, _ in make_head(1).named_parameters()} == {
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    }
    names = {n for n, _ in make_head(3).named_parameters() if n.startswith("mlp")}
    assert names == {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bottleneck_is_normalised_in_float32(dtype):
    head = make_head()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        z = head.embed(torch.randn(5, 6))
    assert z.dtype is torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))


def test_logits_are_products_of_bottleneck_and_effective_weight():
    head = make_head()
    x = torch.randn(5, 6)
    torch.testing.assert_close(head(x), head.embed(x) @ head.last_layer.weight().T)


def test_a_fresh_last_layer_has_rows_of_length_one():
    weight = Prototypes(16, 12).weight()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(12))


def test_the_length_of_v_does_not_matter():
    head = make_head()
    x = torch.randn(5, 6)
    before = head(x)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(torch.linspace(0.1, 10, 10)[:, None])
    torch.testing.assert_close(head(x), before)


def test_a_copy_is_equal_and_independent():
    head = make_head()
    x = torch.randn(5, 6)
    before = head(x)
    head(x).sum().backward()  # the effective weight has been used
    twin = copy.deepcopy(head)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
    with torch.no_grad():
        twin.last_layer.weight_g.add_(1)
        twin.last_layer.weight_v.add_(1)
    torch.testing.assert_close(head(x), before, rtol=0, atol=0)
    assert not torch.equal(twin(x), before)


def test_no_samples():
    head = make_head()
    logits = head(torch.zeros(0, 6))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad.eq(0).all() for p in head.parameters())
