import pytest
import torch
from torch import nn

from dinoforge.optim.movement import sampled, update_ratios


def test_the_ratio_is_the_length_of_the_step_over_that_of_the_weights():
    network = nn.Linear(3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, 0.0, 0.0]]))
        network.bias.fill_(4.0)
        before = sampled({"a": network, "b": nn.Linear(2, 2)})
        network.weight[0, 1] = 0.3
        network.bias.add_(0.4)
    after = sampled({"a": network, "b": nn.Linear(2, 2)})
    ratios = update_ratios(before, after)
    assert float(ratios["a"]) == pytest.approx(0.1, rel=1e-6)
    assert float(ratios["b"]) > 0


def test_a_network_that_rests_has_a_ratio_of_zero():
    networks = {"a": nn.Linear(3, 2)}
    assert float(update_ratios(sampled(networks), sampled(networks))["a"]) == 0


def test_a_sample_of_large_parameters_says_nearly_the_same():
    network = nn.Linear(300, 200)
    generator = torch.Generator().manual_seed(0)

    def ratio(**size):
        before = sampled({"a": network}, **size)
        kept = [p.detach().clone() for p in network.parameters()]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        value = float(update_ratios(before, sampled({"a": network}, **size))["a"])
        moved = sum(float((p.detach() - k).square().sum()) for p, k in zip(network.parameters(), kept, strict=True))
        return value, (moved / sum(float(k.square().sum()) for k in kept)) ** 0.5

    value, exact = ratio()
    assert value == pytest.approx(exact, rel=1e-4)
    assert max(len(s.elements) for s in sampled({"a": network}, most=4000)["a"]) == 4000
    value, exact = ratio(most=4000)
    assert value == pytest.approx(exact, rel=0.05)
