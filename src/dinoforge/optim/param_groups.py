"""Parameter groups: the learning rate and weight decay of each parameter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADAMW_DEFAULT_WEIGHT_DECAY = 0.01
UNREGULARISED = "no weight decay on biases, norms, LayerScale"


@dataclass(frozen=True)
class Rule:
    """The multipliers of a parameter's hyper-parameters, and the reason for them."""

    text: str
    lr_multiplier: float
    wd_multiplier: float
    last_layer: bool
    fixed_weight_decay: float | None = None  # instead of the schedule's


def rule_of(
    name: str,
    *,
    depth: int | None,
    layerwise_decay: float,
    patch_embed_lr_mult: float,
    fixed_weight_decay: float | None = None,
) -> Rule:
    """The rule for one parameter.

    Args:
        name: Official name inside its sub-network, such as ``blocks.3.attn.qkv.weight``.
        depth: L, the number of blocks, of a backbone; None for a head.
        layerwise_decay: The decay d. Block i (from 0) has the factor d^(L - i); patch embedding, position embeddings
            and cls, mask and register tokens have d^(L + 1); the final norm and heads have 1.
        patch_embed_lr_mult: Further factor on the patch embedding.
        fixed_weight_decay: Weight decay of regularised parameters where it does not follow the schedule.
    """
    if depth is None:
        lr, text = 1.0, "head"
    elif block := re.match(r"blocks\.(\d+)\.", name):
        exponent = depth - int(block[1])
        lr, text = layerwise_decay**exponent, f"block {block[1]}: layerwise_decay^{exponent}"
    elif name.startswith("norm."):
        lr, text = 1.0, "final norm"
    else:
        lr, text = layerwise_decay ** (depth + 1), f"embeddings and tokens: layerwise_decay^{depth + 1}"
        if name.startswith("patch_embed."):
            lr, text = lr * patch_embed_lr_mult, f"patch embedding: layerwise_decay^{depth + 1} · patch_embed_lr_mult"
    last_layer = name.startswith("last_layer.")
    if last_layer:
        text = "last layer"
    unregularised = name.endswith(".bias") or "norm" in name or "gamma" in name
    return Rule(
        text=f"{text}; {UNREGULARISED}" if unregularised else text,
        lr_multiplier=lr,
        wd_multiplier=0.0 if unregularised else 1.0,
        last_layer=last_layer,
        fixed_weight_decay=None if unregularised else fixed_weight_decay,
    )


def parameter_groups(
    networks: Mapping[str, nn.Module],
    *,
    depth: int,
    layerwise_decay: float,
    patch_embed_lr_mult: float,
    weight_decay_scope: str = "all",
) -> list[dict[str, Any]]:
    """Make parameter groups for AdamW: parameters of one sub-network with the same rule share a group.

    Besides ``params``, a group carries ``names``, ``module`` (the sub-network) and the fields of ``Rule``;
    ``set_hyperparameters`` turns those into learning rate and weight decay.

    Args:
        networks: The student's sub-networks by name: ``backbone`` and the heads.
        depth: Number of blocks of the backbone.
        layerwise_decay, patch_embed_lr_mult: See ``rule_of``.
        weight_decay_scope: Either ``all`` or ``backbone``, where the heads keep AdamW's default of 0.01 as in
            implementations that schedule only the first group. For comparison only.
    """
    groups: dict[tuple[str, Rule], dict[str, Any]] = {}
    for module, network in networks.items():
        is_backbone = module == "backbone"
        for name, parameter in network.named_parameters():
            rule = rule_of(
                name,
                depth=depth if is_backbone else None,
                layerwise_decay=layerwise_decay,
                patch_embed_lr_mult=patch_embed_lr_mult,
                fixed_weight_decay=(
                    ADAMW_DEFAULT_WEIGHT_DECAY if weight_decay_scope == "backbone" and not is_backbone else None
                ),
            )
            group = groups.setdefault((module, rule), {"params": [], "names": [], "module": module, **vars(rule)})
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def set_hyperparameters(
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    last_layer_lr: float,
    weight_decay: float,
    backbone_lr_mult: float = 1.0,
) -> None:
    """Write learning rate and weight decay into every group; nothing else does."""
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["last_layer"] else lr) * group["lr_multiplier"]
        if group["module"] == "backbone":
            group["lr"] *= backbone_lr_mult
        fixed = group["fixed_weight_decay"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"] if fixed is None else fixed
