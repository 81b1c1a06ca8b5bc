"""Distribute the networks over ranks: activation checkpointing, then DDP or FSDP2, all from PyTorch."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import Losses, StudentTeacher
from dinoforge.models.head import DINOHead
from dinoforge.models.network import Network
from dinoforge.models.vit import VisionTransformer
from dinoforge.system import distributed

Mode = Literal["none", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Parallel:
    """The setup of a step on this rank.

    Args:
        mode: The way in which the networks are distributed.
        forward: The callable for the forward pass, with the arguments of ``StudentTeacher``.
        accumulating: Makes the context for all pieces of a step but the last, in which gradients are not averaged.
    """

    mode: Mode
    forward: Callable[..., Losses]
    accumulating: Callable[[], AbstractContextManager[Any]] = nullcontext


def shard_count(mode: Mode, shard_ranks: int | None) -> int:
    """Count the ranks over which weights are sharded here; ``shard_ranks`` is as for ``wrap``."""
    if mode == "hsdp":
        return shard_ranks or distributed.local_world_size()
    return distributed.world_size() if mode == "fsdp" else 1


def copies_and_shards(ranks: int, inner: int) -> tuple[int, int]:
    """Compute the number of copies of the networks under hsdp, and the number of ranks that shard each copy.

    Args:
        ranks: The number of all ranks.
        inner: The number of ranks that shard a copy.

    Raises:
        RecipeError: There are too few ranks, or ``inner`` does not divide their number.
    """
    if ranks % inner or not 1 < inner < ranks:
        raise RecipeError(
            f"parallel.mode=hsdp: {ranks} ranks cannot be cut into copies of {inner} ranks each: expected "
            "parallel.shard_ranks to be more than 1 and less than the number of ranks, and to divide it"
            + ("; hsdp needs 4 ranks at least: set parallel.mode=fsdp" if ranks < 4 else "")
        )
    return ranks // inner, inner


def wrap(
    student_teacher: StudentTeacher,
    mode: Mode,
    device: torch.device,
    *,
    activation_checkpointing: bool = False,
    shard_ranks: int | None = None,
    some_frozen: bool = False,
    timeout: timedelta | None = None,
) -> Parallel:
    """Distribute networks over the ranks; they must be on the device, and equal on all ranks.

    Args:
        student_teacher: The networks, changed in place: sharded parameters become ``DTensor``s.
        mode: The way to distribute them; see ``choose_mode``.
        device: The device of this rank.
        activation_checkpointing: Whether to keep only the inputs of the student's blocks, and recompute the other
            activations in the backward pass.
        shard_ranks: For hsdp: the number of ranks that shard a copy; None: the ranks of one machine.
        some_frozen: Whether some parameters get no gradient in some steps.
        timeout: How long ranks that shard or replicate weights wait for each other; None: PyTorch's default.

    Raises:
        RecipeError: The ranks cannot be divided for this mode.
    """
    if activation_checkpointing:
        for block in student_teacher.student.backbone.blocks:
            # Set on the instance, so that no parameter is renamed.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if mode == "none":
        return Parallel(mode, student_teacher)
    if mode == "ddp":
        ddp = nn.parallel.DistributedDataParallel(
            student_teacher,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=some_frozen,
        )
        return Parallel(mode, ddp, ddp.no_sync)
    mesh = _mesh(mode, device, shard_ranks, timeout)
    for networks in (student_teacher.student, student_teacher.teacher):
        _shard(networks, mesh)
    # Each piece's gradients are reduced at once: unreduced gradients would take the memory that sharding saves.
    return Parallel(mode, student_teacher)


def _mesh(mode: Mode, device: torch.device, shard_ranks: int | None, timeout: timedelta | None) -> DeviceMesh:
    ranks = distributed.world_size()
    if mode == "fsdp":
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    else:
        shape = copies_and_shards(ranks, shard_count(mode, shard_ranks))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if timeout is not None:
        for group in mesh.get_all_groups():  # groups made for the mesh have PyTorch's default timeout
            distributed.set_timeout(group, timeout)
    return mesh


def _shard(networks: Network, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to each block, the rest of the backbone, and both parts of each head."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # The views are of tokens, which are never modified in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for network in networks.parts.values():
        if isinstance(network, VisionTransformer):
            for block in network.blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
            # Reshard after the forward pass, also for the teacher, which has no backward pass: its shards are updated.
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(network, "encode_some")
        elif isinstance(network, DINOHead):
            fully_shard(network.mlp, mesh=mesh, reshard_after_forward=True)
            fully_shard(network.last_layer, mesh=mesh, reshard_after_forward=True)
            # Return copies: the unsharded parameters are freed after the call.
            network.last_layer.parts = partial(_copies, network.last_layer.parts)  # type: ignore[method-assign]
            register_fsdp_forward_method(network.last_layer, "parts")


def _copies(parts: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = parts()
    return first.clone(), second.clone()
