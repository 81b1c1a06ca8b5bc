"""Gradient clipping."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinoforge.system import distributed


def clip_gradients(networks: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient norm of each sub-network by itself, as the reference does; 0 only measures.

    Returns:
        The norm of each sub-network before clipping, on its device.
    """
    limit = max_norm if max_norm > 0 else float("inf")
    norms = {name: torch.nn.utils.clip_grad_norm_(network.parameters(), limit) for name, network in networks.items()}
    return {name: distributed.whole(norm) for name, norm in norms.items()}
