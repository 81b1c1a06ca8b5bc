"""Cross-entropy between teacher targets and student logits without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.losses.targets import Targets

_ELEMENTS_AT_ONCE = 1 << 22  # of the logits [rows, K]


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, since everything it needs is at hand there."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        prototypes: Tensor,
        targets: Targets,
        target_rows: Tensor,
        weights: Tensor,
        temp: float,
        dtype: torch.dtype,
    ) -> Tensor:
        need_embeddings, need_prototypes = ctx.needs_input_grad[:2]
        w = prototypes.to(dtype)
        loss = embeddings.new_zeros((), dtype=torch.float32)
        grad_embeddings = torch.empty_like(embeddings) if need_embeddings else None
        grad_prototypes = torch.zeros_like(prototypes) if need_prototypes else None
        chunk = max(1, _ELEMENTS_AT_ONCE // len(prototypes))
        for start in range(0, len(embeddings), chunk):
            rows = slice(start, start + chunk)
            z = embeddings[rows].to(dtype)
            logits = (z @ w.T).float().div_(temp)  # [n, K]
            target = targets.rows(target_rows[rows, 0])  # [n, K]
            for j in range(1, target_rows.shape[1]):
                target += targets.rows(target_rows[rows, j])
            log_norm = torch.logsumexp(logits, dim=1)
            mass = target.sum(dim=1)
            weight = weights[rows]
            loss += (weight * (mass * log_norm - torch.linalg.vecdot(target, logits))).sum()
            if grad_embeddings is None and grad_prototypes is None:
                continue
            # d loss / d logits = weight · (mass · softmax(logits) - target)
            grad = logits.sub_(log_norm[:, None]).exp_().mul_(mass[:, None]).sub_(target)
            grad = grad.mul_((weight / temp)[:, None]).to(dtype)
            if grad_embeddings is not None:
                grad_embeddings[rows] = grad @ w
            if grad_prototypes is not None:
                grad_prototypes += grad.T @ z
        ctx.save_for_backward(grad_embeddings, grad_prototypes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_embeddings, grad_prototypes = ctx.saved_tensors
        return (
            None if grad_embeddings is None else grad_embeddings * grad,
            None if grad_prototypes is None else grad_prototypes * grad,
            *[None] * 5,
        )


def cross_entropy(
    embeddings: Tensor, prototypes: Tensor, targets: Targets, target_rows: Tensor, weights: Tensor, temp: float
) -> Tensor:
    """Weighted cross-entropy of student logits ``embeddings @ prototypes.T / temp`` against teacher targets.

    As pseudocode:

        for r in range(R):
            for j in range(J):
                loss -= weights[r] * dot(targets[target_rows[r, j]], log_softmax(logits[r]))

    Logits exist for a few rows at a time; the gradient is computed on the way, so memory does not grow with R · K.
    Under autocast to bfloat16 the products run in it; sums, softmax and loss are float32. float16 has too little
    range for these gradients before they are scaled, so there the products stay in float32.

    Args:
        embeddings: normalised student bottlenecks [R, d].
        prototypes: effective weight of the student's last layer [K, d].
        targets: of the teacher.
        target_rows: the targets that each row is held against [R, J].
        weights: of each row [R].
        temp: the student's temperature.
    """
    device = embeddings.device.type
    bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    dtype = torch.bfloat16 if bf16 else embeddings.dtype
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(embeddings, prototypes, targets, target_rows, weights, temp, dtype)
    return loss
