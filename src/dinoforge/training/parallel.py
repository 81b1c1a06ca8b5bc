"""How the networks are laid over ranks: activation checkpointing, then DDP or FSDP2, all by PyTorch's own engine."""

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
    """How a step runs on this rank.

    Args:
        mode: what was done to the networks.
        forward: called as the ``StudentTeacher`` is.
        accumulating: context of the micro-batches before a step's last one, in which gradients need not be averaged.
    """

    mode: Mode
    forward: Callable[..., Losses]
    accumulating: Callable[[], AbstractContextManager[Any]] = nullcontext


def shard_count(mode: Mode, shard_ranks: int | None) -> int:
    """Over how many of the ranks here weights are sharded; ``shard_ranks`` as for ``wrap``."""
    if mode == "hsdp":
        return shard_ranks or distributed.local_world_size()
    return distributed.world_size() if mode == "fsdp" else 1


def copies_and_shards(ranks: int, inner: int) -> tuple[int, int]:
    """How many copies of the networks hsdp makes of so many ranks, and over how many ranks each is sharded.

    Raises:
        RecipeError: there are too few ranks, or they cannot be cut so.
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
    """Lays the networks, which are equal on all ranks and on the device, over the ranks.

    Args:
        student_teacher: changed in place: sharded parameters are ``DTensor``s.
        mode: see ``choose_mode``.
        device: this rank's.
        activation_checkpointing: keep only the inputs of the student's blocks, and compute the rest again in the
            backward pass.
        shard_ranks: for hsdp: over how many ranks a copy is sharded; None: those of a machine.
        some_frozen: whether there are steps in which some parameters get no gradient.
        timeout: how long the ranks that share or copy weights wait for each other; None: as long as PyTorch does.

    Raises:
        RecipeError: ranks that cannot be laid out so.
    """
    if activation_checkpointing:
        for block in student_teacher.student.backbone.blocks:
            # An attribute of the instance, so that no name changes.
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
    # Each micro-batch's gradients are reduced at once: kept whole, they would take the memory that sharding saves.
    return Parallel(mode, student_teacher)


def _mesh(mode: Mode, device: torch.device, shard_ranks: int | None, timeout: timedelta | None) -> DeviceMesh:
    ranks = distributed.world_size()
    if mode == "fsdp":
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    else:
        shape = copies_and_shards(ranks, shard_count(mode, shard_ranks))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if timeout is not None:
        for group in mesh.get_all_groups():  # those made for the mesh have PyTorch's own timeout
            distributed.set_timeout(group, timeout)
    return mesh


def _shard(networks: Network, mesh: DeviceMesh) -> None:
    """FSDP2 for each block, the rest of the backbone, and both parts of each head."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Of tokens, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for network in networks.parts.values():
        if isinstance(network, VisionTransformer):
            for block in network.blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
            # Also after the forward pass of a network that has no backward pass: its shards are what is updated.
            fully_shard(network, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(network, "encode_some")
        elif isinstance(network, DINOHead):
            fully_shard(network.mlp, mesh=mesh, reshard_after_forward=True)
            fully_shard(network.last_layer, mesh=mesh, reshard_after_forward=True)
            # Copies, which are there after the call; the whole parameters are not.
            network.last_layer.parts = partial(_copies, network.last_layer.parts)  # type: ignore[method-assign]
            register_fsdp_forward_method(network.last_layer, "parts")


def _copies(parts: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = parts()
    return first.clone(), second.clone()
