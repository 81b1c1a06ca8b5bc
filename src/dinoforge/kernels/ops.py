"""The door to the arithmetic: the operations that the method and the networks are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels.cross_entropy import LastLayer as LastLayer
from dinoforge.kernels.cross_entropy import cross_entropy as cross_entropy
from dinoforge.kernels.linear import NormLinear, ScaledLinear
from dinoforge.kernels.rows import product_dtype
from dinoforge.kernels.targets import centering as centering
from dinoforge.kernels.targets import sinkhorn_knopp as sinkhorn_knopp
from dinoforge.kernels.targets import teacher_logits as teacher_logits
from dinoforge.kernels.tiles import Scratch as Scratch
from dinoforge.kernels.tiles import largest_logit as largest_logit
from dinoforge.kernels.types import Targets as Targets
from dinoforge.kernels.types import Term as Term


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``: the start of a residual branch.

    Args:
        x: [T, D].
        norm: over D.
        linear: from D to D'.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)
    return out


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``linear(x) * scale``, or ``linear(gelu(x)) * scale``: the end of a residual branch, or a layer of an MLP.

    Args:
        x: [T, D'].
        linear: from D' to D.
        scale: LayerScale's factors [D], or None.
        gelu: whether to apply it first.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if dtype is torch.float16 and scale is not None:
            # The gradient of a weight that is not scaled yet, at a scale of 1e-5 and times the loss scale, is beyond
            # float16. The scale is float32, and so is what it multiplies on the way back.
            bias = None if linear.bias is None else linear.bias.to(dtype)
            y = F.gelu(x.to(dtype)) if gelu else x.to(dtype)
            return F.linear(y, linear.weight.to(dtype), bias) * scale
        out: Tensor = ScaledLinear.apply(x.to(dtype), linear.weight, linear.bias, scale, gelu)
    return out
