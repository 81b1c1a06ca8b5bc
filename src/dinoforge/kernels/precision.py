"""The precision of each computation."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a linear layer multiplies ``x``: that of autocast, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def last_layer_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a last layer multiplies ``x``: bfloat16 under autocast to it, else that of ``x``.

    Under autocast to float16 it is float32, since float16 has too little range for the gradients before they are
    scaled.
    """
    return torch.bfloat16 if product_dtype(x) is torch.bfloat16 else x.dtype


def exact(x: Tensor) -> Tensor:
    """Convert ``x`` to float32 if it is in half precision; otherwise return it as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
