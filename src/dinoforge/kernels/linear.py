"""A linear layer fused with a norm or a scale on a CPU, without storing the intermediate result."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.kernels import private
from dinoforge.kernels.rows import added, few_rows, gradient_of_weight, linear_rows, product


class NormLinear(torch.autograd.Function):
    """LayerNorm and a linear layer; keeps only ``x``, in the product's precision, and normalises again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        out = x.new_empty(len(x), len(w), dtype=dtype)
        moments: list[tuple[Tensor, Tensor]] = []
        for rows in few_rows(x, dtype):
            normed, mean, rstd = torch.native_layer_norm(x[rows], x.shape[-1:], norm_weight, norm_bias, eps)
            moments.append((mean, rstd))
            linear_rows(normed.to(dtype), w, b, out=out[rows])
        mean, rstd = (torch.cat(parts) for parts in zip(*moments, strict=True))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x.to(dtype), mean, rstd, norm_weight, norm_bias, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, mean, rstd, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        of_layer_norm = private.layer_norm_backward()
        assert of_layer_norm is not None
        w = weight.to(grad.dtype)
        grad_x = torch.empty_like(x, dtype=norm_weight.dtype)
        sums: list[Tensor | None] = [None] * 4  # gradients of both weights and both biases
        for rows in few_rows(x, grad.dtype):
            x_rows, g = x[rows].to(norm_weight.dtype), grad[rows]
            normed = ((x_rows - mean[rows]) * rstd[rows]).mul_(norm_weight).add_(norm_bias).to(g.dtype)
            grad_normed = product(g, w).to(norm_weight.dtype)
            grad_x[rows], *of_norm = of_layer_norm(
                grad_normed, x_rows, x.shape[-1:], mean[rows], rstd[rows], norm_weight, norm_bias, [True, True, True]
            )
            of_weight = gradient_of_weight(g, normed).to(weight.dtype)
            of_bias = None if bias is None else g.sum(dim=0, dtype=bias.dtype)
            sums = added(sums, [*of_norm, of_weight, of_bias])
        grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = sums
        return grad_x, grad_norm_weight, grad_norm_bias, None, grad_weight, grad_bias, None


class ScaledLinear(torch.autograd.Function):
    """A linear layer and LayerScale; keeps only ``x``, and derives the scale's gradient from that of the weights.

    With y = (x W^T + b) · scale, the scale's gradient is sum(dy · (x W^T + b)) over tokens, which equals
    sum((dy^T x) · W) over inputs + sum(dy) · b. So backward needs neither the unscaled output nor a second pass over
    the tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.gelu = gelu
        # In half precision, the factors are folded into the weights: one rounding less, and no pass over the output.
        factors = scale if x.dtype is weight.dtype else None  # the output is multiplied by these
        folded = scale if factors is None else None
        w = (weight if folded is None else weight * folded[:, None]).to(x.dtype)
        b = None if bias is None else (bias if folded is None else bias * folded).to(x.dtype)
        out = x.new_empty(len(x), len(w))
        for rows in few_rows(x, x.dtype):
            linear_rows(F.gelu(x[rows]) if gelu else x[rows], w, b, out=out[rows])
            if factors is not None:
                out[rows] *= factors
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, bias, scale = ctx.saved_tensors
        of_gelu = private.gelu_backward() if ctx.gelu else None
        w = (weight if scale is None else weight * scale[:, None]).to(grad.dtype)
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * 2  # gradients of the scaled weight [D, D'] and bias
        for rows in few_rows(x, x.dtype):
            x_rows, g = x[rows], grad[rows]
            y = F.gelu(x_rows) if ctx.gelu else x_rows
            of_bias = None if bias is None else g.sum(dim=0, dtype=weight.dtype)
            sums = added(sums, [gradient_of_weight(g, y).to(weight.dtype), of_bias])
            if of_gelu is not None:
                of_gelu(product(g, w), x_rows, grad_input=grad_x[rows])
            else:
                linear_rows(g, w.T, None, out=grad_x[rows])
        grad_weight, grad_bias = sums
        assert grad_weight is not None
        if scale is None:
            return grad_x, grad_weight, grad_bias, None, None
        grad_scale = (grad_weight * weight).sum(dim=1)
        if bias is not None and grad_bias is not None:
            grad_scale += grad_bias * bias
            grad_bias = grad_bias * scale
        return grad_x, grad_weight.mul_(scale[:, None]), grad_bias, grad_scale, None
