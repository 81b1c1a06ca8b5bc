"""The distance by which an optimizer step moves the weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_ELEMENTS = 2**16  # copied elements of a parameter, so that a giant network's copy stays below 200 MB


@dataclass(frozen=True)
class Sample:
    """Evenly spaced elements of a parameter, and how many each stands for."""

    elements: Tensor
    stride: int


@torch.no_grad()
def sampled(networks: Mapping[str, nn.Module], *, most: int = MOST_ELEMENTS) -> dict[str, list[Sample]]:
    """Copy the weights of each sub-network, at most ``most`` elements of each parameter."""
    copied: dict[str, list[Sample]] = {}
    for name, network in networks.items():
        copied[name] = []
        for parameter in network.parameters():
            # Of a sharded parameter its local part: to read all of it would wait for other ranks.
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if stride := math.ceil(local.numel() / most):
                copied[name].append(Sample(local.flatten()[::stride].clone(), stride))
    return copied


def update_ratios(before: Mapping[str, list[Sample]], after: Mapping[str, list[Sample]]) -> dict[str, Tensor]:
    """The length of a step over that of the weights, ``|after - before| / |before|``, of each sub-network.

    A sub-network of which this rank has nothing is left out: with more ranks than rows, some shards are empty.
    """
    ratios = {}
    for name, old in before.items():
        if not old:
            continue
        moved = [s.stride * (new.elements - s.elements).square().sum() for s, new in zip(old, after[name], strict=True)]
        length = [s.stride * s.elements.square().sum() for s in old]
        ratios[name] = (torch.stack(moved).sum() / torch.stack(length).sum()).sqrt()
    return ratios
