"""In which precision what is computed."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """In which precision a linear layer multiplies ``x``: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def last_layer_dtype(x: Tensor) -> torch.dtype:
    """In which precision a last layer multiplies ``x``: bfloat16 under autocast to it, else that of ``x``.

    float16 has too little range for the gradients before they are scaled, so there it is float32.
    """
    return torch.bfloat16 if product_dtype(x) is torch.bfloat16 else x.dtype


def exact(x: Tensor) -> Tensor:
    """``x`` itself, or in float32 if it is of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
