import pytest
import torch
from torch import nn

from dinoforge.optim.clipping import clip_gradients


def make_networks(scales=(10.0, 0.1)):
    generator = torch.Generator().manual_seed(0)
    networks = {"backbone": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "dino_head": nn.Linear(2, 5)}
    for network, scale in zip(networks.values(), scales, strict=True):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return networks


def norm(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()


def copies(networks):
    return {name: [p.grad.clone() for p in network.parameters()] for name, network in networks.items()}


def test_each_network_is_clipped_by_itself():
    networks = make_networks()
    before = copies(networks)
    expected = {name: norm(network) for name, network in networks.items()}
    assert expected["backbone"] > 3 > expected["dino_head"]
    norms = clip_gradients(networks, 3.0)
    torch.testing.assert_close(norms, expected)  # as they were before clipping
    torch.testing.assert_close(norm(networks["backbone"]), torch.tensor(3.0), rtol=1e-5, atol=0)
    factor = 3.0 / expected["backbone"]
    for parameter, gradient in zip(networks["backbone"].parameters(), before["backbone"], strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-5, atol=0)
    for parameter, gradient in zip(networks["dino_head"].parameters(), before["dino_head"], strict=True):
        assert torch.equal(parameter.grad, gradient)  # below the limit: untouched


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_nothing_changes_without_a_limit_or_below_it(limit):
    networks = make_networks()
    before = copies(networks)
    expected = {name: norm(network) for name, network in networks.items()}
    torch.testing.assert_close(clip_gradients(networks, limit), expected)
    for name, network in networks.items():
        assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before[name], strict=True))


def test_parameters_without_gradient_are_left_alone():
    networks = make_networks()
    networks["dino_head"].weight.grad = None
    expected = networks["dino_head"].bias.grad.norm()
    torch.testing.assert_close(clip_gradients(networks, 0.0)["dino_head"], expected)
    assert networks["dino_head"].weight.grad is None


def test_zero_gradients_stay_zero():
    networks = make_networks(scales=(0.0, 0.0))
    assert {name: float(n) for name, n in clip_gradients(networks, 1.0).items()} == {"backbone": 0.0, "dino_head": 0.0}
    assert float(norm(networks["backbone"])) == 0
