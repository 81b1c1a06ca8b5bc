"""The work of a step, counted in products."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from dinoforge.builders.data import build_masks
from dinoforge.builders.networks import build_drop_path_rates, vit_size
from dinoforge.data.order import sample_rng
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.schema import Recipe

_MASKED_CROPS_SAMPLE = 512


@dataclass(frozen=True)
class Masks:
    """Measurements of the masks that the recipe's generator draws."""

    kind: str
    grid: tuple[int, int]  # patches
    crops: int  # global crops that were drawn
    masked_crops: float  # share of the crops that are masked at all
    ratio_mean: float  # share of a masked crop's patches that is masked
    ratio_min: float
    ratio_max: float
    masked_tokens_per_batch: float


@dataclass(frozen=True)
class Work:
    """Matrix products of one part of a step, on one process."""

    part: str
    rows: int  # tokens that go through
    flops: float


def measure_masks(recipe: Recipe, *, batch: int) -> Masks:
    """Draws the masks of the first batches of a run, at least a few hundred crops, and measures them."""
    draw = build_masks(recipe)
    side = recipe.crops.global_crops_size // recipe.student.patch_size
    batches = -(-_MASKED_CROPS_SAMPLE // (2 * batch))
    masks = np.concatenate(
        [draw(2 * batch, (side, side), sample_rng(recipe.train.seed, i * batch, "masks")) for i in range(batches)]
    )  # [crops, N]
    counts = masks.sum(axis=1)
    ratios = counts[counts > 0] / masks.shape[1] if counts.any() else np.zeros(1)
    return Masks(
        kind=recipe.ibot.mask_kind,
        grid=(side, side),
        crops=len(masks),
        masked_crops=float((counts > 0).mean()),
        ratio_mean=float(ratios.mean()),
        ratio_min=float(ratios.min()),
        ratio_max=float(ratios.max()),
        masked_tokens_per_batch=float(counts.sum() / batches),
    )


def work_of_a_step(recipe: Recipe, networks: StudentTeacher, *, masked: float) -> list[Work]:
    """Floating-point operations in the matrix products of a step on one process; an addition counts as one.

    A weight of n values costs 2·n for each token in the forward pass, attention among N tokens of an image 4·N²·D in
    each block. The backward pass costs twice the forward pass, but once for the patch embedding, whose input has no
    gradient. The teacher only goes forward. Stochastic depth leaves out the images that a branch drops. After its
    attention, the last block computes only cls tokens and masked patches.

    Args:
        recipe: The recipe of the run.
        networks: The networks, on any device, also ``meta``.
        masked: Number of masked patches in a step, in all global crops of the process.
    """
    o, batch = networks.objective, recipe.train.batch_size_per_gpu * recipe.train.accumulate
    c, s = recipe.crops, recipe.student
    teaches = o.has_dino or o.has_ibot
    reads_local = o.dino_local_weight > 0 and c.local_crops_number > 0
    crops = {"global": (2 * batch, (c.global_crops_size // s.patch_size) ** 2)}  # images, patches of each
    if reads_local:
        crops["local"] = (c.local_crops_number * batch, (c.local_crops_size // s.patch_size) ** 2)
    rates = build_drop_path_rates(recipe)
    work: list[Work] = []
    read = masked if o.has_ibot else 0.0  # patch tokens of the last block that a loss reads, of all global crops
    for kind, (images, patches) in crops.items():
        tokens = patches + 1 + s.num_register_tokens
        last = images + (read if kind == "global" else 0)
        flops = _backbone(recipe, networks.student.backbone, images, patches, last, rates, passes=3)
        work.append(Work(f"student, {kind} crops", images * tokens, flops))
    if teaches:
        images, patches = crops["global"]
        tokens = patches + 1 + s.num_register_tokens
        flops = _backbone(
            recipe, networks.teacher.backbone, images, patches, images + read, [0.0] * len(rates), passes=1
        )
        work.append(Work("teacher, global crops", images * tokens, flops))
    samples: dict[str, tuple[float, float]] = {}  # head: rows of the student, rows of the teacher
    if o.has_dino:
        samples["dino_head"] = (2.0 * batch + (c.local_crops_number * batch if reads_local else 0), 2.0 * batch)
    if o.has_ibot:
        student, teacher = samples.get(networks.student.patch_head_name, (0.0, 0.0))
        samples[networks.student.patch_head_name] = (student + masked, teacher + masked)
    for head, (student, teacher) in samples.items():
        network = networks.student.heads[head]
        flops = 2.0 * (3 * student + teacher) * _weights(network)
        work.append(Work(f"{head}, student and teacher", round(student + teacher), flops))
    if o.koleo_weight > 0:
        work.append(Work("KoLeo", 2 * batch, 2 * 2.0 * batch**2 * vit_size(recipe)[0]))
    return work


def _backbone(
    recipe: Recipe,
    backbone: VisionTransformer,
    images: int,
    patches: int,
    read: float,
    rates: Sequence[float],
    *,
    passes: int,
) -> float:
    """FLOPs of a group of images; ``passes`` is 1 forward, 3 with the backward pass.

    After its attention, the last block computes only the ``read`` tokens that a loss reads.
    """
    blocks: Any = backbone.blocks
    tokens = patches + 1 + recipe.student.num_register_tokens
    flops: float = (2 if passes == 3 else 1) * 2.0 * images * patches * backbone.patch_embed.proj.weight.numel()
    last = len(blocks) - 1
    for i, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
        kept = max(int(images * (1 - rate)), 1)
        after = kept * tokens if i < last else read * kept / images
        products = 2.0 * kept * tokens * _weights(block.attn.qkv)
        products += 2.0 * after * (_weights(block.attn.proj) + _weights(block.mlp))
        flops += passes * (products + kept * 4.0 * tokens**2 * backbone.embed_dim)
    return flops


def _weights(network: nn.Module) -> int:
    """Values of the weights that tokens are multiplied with."""
    return sum(p.numel() for name, p in network.named_parameters() if name.endswith(("weight", "weight_v")))
