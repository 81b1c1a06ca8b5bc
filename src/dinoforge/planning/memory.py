"""Estimates of the memory that a run takes, by part, before it starts.

A step takes most at one of four moments: when the teacher makes its targets; when the losses are done; when the heads
have their gradients and those of the backbone begin; when nearly all gradients are there. What is alive then follows
from the sizes of network, crops and batch, and from what the kernels keep, and the estimate is that of the largest.
docs/running.md compares it with measured runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from dinoforge.builders.layout import turn_tokens
from dinoforge.builders.networks import build_student_teacher
from dinoforge.data.batches import PREFETCH
from dinoforge.kernels import plain
from dinoforge.kernels.tiles import SPARE, columns_at_once
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.layers import Block, Mlp, SwiGLU
from dinoforge.recipe.schema import Recipe
from dinoforge.training.parallel import Mode, shard_count
from dinoforge.training.pieces import crops_in_turn

_LIBRARIES = 0.65 * 2**30  # on a CPU: the interpreter, PyTorch and the others
_WORKER = 0.06 * 2**30  # bytes that a process which makes batches does not share with the rank
_COMPILER = 0.15 * 2**30  # PyTorch's, which its activation checkpointing, DDP and FSDP2 import
_GAPS = 0.1  # bytes that the C library holds between blocks for each byte of tensors
_WORTH_IT = 0.95  # share of the recipe's memory above which a way to save is not worth telling


def estimate(
    recipe: Recipe,
    networks: StudentTeacher,
    *,
    precision: torch.dtype,
    device: torch.device,
    mode: Mode = "none",
    shards: int = 1,
    reading: float = 0.0,
) -> dict[str, float]:
    """Peak bytes of one rank by part: its tensors, and on a CPU what else the process and its workers take.

    Args:
        recipe: The recipe of the run.
        networks: The networks, unsharded, on any device, also ``meta``.
        precision: The dtype of matrix products.
        device: The device that it would run on, which need not be here.
        mode: How the networks are laid over ranks.
        shards: Number of ranks over which weights are sharded.
        reading: Bytes of main memory that it takes to read images, from ``of_reading``.
    """
    parts = of_tensors(recipe, networks, precision=precision, device=device, mode=mode, shards=shards)
    if device.type == "cpu":
        compiler = mode != "none" or recipe.parallel.activation_checkpointing
        libraries = _LIBRARIES + (_COMPILER if compiler else 0)
        parts |= {"libraries": libraries, "gaps between tensors": _GAPS * sum(parts.values())}
        if recipe.checkpoint.asynchronous:
            parts["checkpoint"] = 16.0 * sum(p.numel() for p in networks.student.parameters())
        if reading:
            parts["reading"] = reading
    return parts


def of_reading(recipe: Recipe, working_bytes: float, workers: int) -> float:
    """Bytes of main memory that one rank takes to read images, beside the batch that a step works on.

    Args:
        recipe: The recipe of the run.
        working_bytes: Most bytes that it takes to decode an image; see ``data.decoding_memory.working_bytes``.
        workers: Number of processes that make batches; 0: the rank itself does.
    """
    if not workers:
        return working_bytes
    # Each worker makes one batch and has others ready, in shared memory.
    batches = (1 + PREFETCH) * _values_of_batch(recipe)
    return workers * (_WORKER + working_bytes + batches)


def _values_of_batch(recipe: Recipe) -> int:
    """Values of a rank's crops of a step, a byte each before they are normalised."""
    crops, train = recipe.crops, recipe.train
    values = 2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    return train.batch_size_per_gpu * train.accumulate * recipe.student.in_chans * values


def of_tensors(
    recipe: Recipe,
    networks: StudentTeacher,
    *,
    precision: torch.dtype,
    device: torch.device,
    mode: Mode = "none",
    shards: int = 1,
) -> dict[str, float]:
    """Peak bytes of one rank's tensors by part, which is what accelerators count; arguments as for ``estimate``."""
    weights = _Weights.of(networks)
    images = recipe.train.batch_size_per_gpu
    local = recipe.crops.local_crops_number if networks.objective.dino_local_weight > 0 else 0
    least = turn_tokens(recipe.parallel, device, mode)
    turns = crops_in_turn(networks, images, local, _tokens(recipe, networks), least)
    passes = [(images * len(c.views), images * c.local_number) for c in turns]
    in_turn = len(passes) > 1

    def moment(step: "_Step", activations: float, gradients: int, losses: float) -> dict[str, float]:
        parts = {
            "student and teacher": 8 * weights.all / shards,
            "optimizer": 8 * weights.all / shards,
            # DDP makes room for all of them at once, in the buckets that it sends; those of a first pass are beside it.
            "gradients": 4 * ((1 + in_turn) * weights.all if mode == "ddp" else gradients) / shards,
            "activations": activations,
            "losses": losses,
            "batch": step.batch,
        }
        if mode in ("fsdp", "hsdp"):
            # The last layers' copies and their gradients; two blocks that are gathered, and the gradient of one.
            # Between passes, one gradient of a last layer waits.
            parts["whole layers"] = 4.0 * ((2 + in_turn) * weights.last + 3 * weights.block)
        return parts

    moments = []
    for number, counts in enumerate(passes):
        step = _Step(recipe, networks, precision, device, counts, in_turn=in_turn)
        # The others find the gradients of the first.
        none, last, heads = (weights.all,) * 3 if number else (0, weights.last, weights.heads)
        moments += [
            moment(step, 0.0, none, step.teacher),
            moment(step, step.activations, last, step.losses),
            moment(step, step.activations + step.working, heads, step.after_losses),
            moment(step, step.one_block + step.working, weights.all, step.after_losses),
        ]
    return max(moments, key=lambda parts: sum(parts.values()))


def ways_to_save(
    recipe: Recipe,
    *,
    ranks: int,
    mode: str,
    device: torch.device | None = None,
    precision: torch.dtype = torch.bfloat16,
    reading: float = 0.0,
) -> list[str]:
    """Keys that would take less memory than the recipe does, each with its estimate, in the order to try them.

    The first costs least. What is on already is left out, and so is what would not help by the estimate.

    Args:
        recipe: The recipe of the run, with its batch cut for the ranks.
        ranks: Number of ranks over all machines.
        mode: How the networks are laid over ranks; see ``dinoforge.training.parallel.Mode``.
        device: The device that it runs on; None: an accelerator.
        precision: The dtype of matrix products.
        reading: As for ``estimate``.
    """
    device = device or torch.device("cuda")
    with torch.device("meta"):
        networks = build_student_teacher(recipe)

    def size(recipe: Recipe, mode: str, shards: int, precision: torch.dtype = precision) -> float:
        parts = estimate(
            recipe,
            networks,
            precision=precision,
            device=device,
            mode=cast(Mode, mode),
            shards=shards,
            reading=reading,
        )
        return sum(parts.values())

    shards = {"fsdp": ranks, "hsdp": shard_count("hsdp", recipe.parallel.shard_ranks)}.get(mode, 1)
    train, parallel = recipe.train, recipe.parallel
    ways: list[tuple[str, float]] = []
    if recipe.checkpoint.asynchronous:  # takes memory on a CPU, where the copy is beside all else
        waiting = replace(recipe, checkpoint=replace(recipe.checkpoint, asynchronous=False))
        ways.append(("checkpoint.asynchronous=false", size(waiting, mode, shards)))
    parts = next((n for n in range(2, train.batch_size_per_gpu + 1) if train.batch_size_per_gpu % n == 0), None)
    if parts is not None:
        images, accumulate = train.batch_size_per_gpu // parts, train.accumulate * parts
        keys = f"train.accumulate={accumulate}"
        if train.batch_size is None:  # or else the keys contradict each other, and that one wins
            keys = f"train.batch_size_per_gpu={images} {keys}"
        kept = "the same global batch"
        if recipe.dino.koleo_loss_weight > 0 and recipe.dino.koleo_scope == "rank":
            kept += f", but KoLeo compares {images} images at a time"
        cut = replace(recipe, train=replace(train, batch_size_per_gpu=images, accumulate=accumulate))
        ways.append((f"{keys} ({kept})", size(cut, mode, shards)))
    if parallel.crops_in_turn is not True:
        in_turn = replace(recipe, parallel=replace(parallel, crops_in_turn=True))
        ways.append(("parallel.crops_in_turn=true", size(in_turn, mode, shards)))
    if not parallel.activation_checkpointing:
        again = replace(recipe, parallel=replace(parallel, activation_checkpointing=True))
        ways.append(("parallel.activation_checkpointing=true", size(again, mode, shards)))
    refused = recipe.precision == "fp16" or (device.type == "cuda" and parallel.backend == "gloo")
    if ranks > 1 and mode not in ("fsdp", "hsdp") and not refused:
        sharded = torch.float32 if precision is torch.float16 else precision
        ways.append(("parallel.mode=fsdp", size(recipe, "fsdp", ranks, sharded)))
    now = size(recipe, mode, shards)
    return [f"{keys}: about {total / 2**30:.1f} GiB" for keys, total in ways if total < _WORTH_IT * now]


@dataclass(frozen=True)
class _Weights:
    """Numbers of parameters of the student, which are the teacher's too."""

    all: int
    heads: int
    last: int  # number of prototypes of the heads
    block: int  # one block of the backbone

    @classmethod
    def of(cls, networks: StudentTeacher) -> "_Weights":
        def count(prefix: str, ending: str = "") -> int:
            named = networks.student.named_parameters()
            return sum(p.numel() for name, p in named if name.startswith(prefix) and name.endswith(ending))

        total = count("")
        return cls(total, total - count("backbone."), count("", "last_layer.weight_v"), count("backbone.blocks.0."))


class _Step:
    """Bytes that one forward and backward pass of a micro-batch takes beside weights and gradients.

    Args:
        recipe, networks, precision, device: As for ``estimate``.
        counts: Numbers of global and of local crops that the student sees in the pass.
        in_turn: Whether the step has other passes.
    """

    def __init__(
        self,
        recipe: Recipe,
        networks: StudentTeacher,
        precision: torch.dtype,
        device: torch.device,
        counts: tuple[int, int],
        *,
        in_turn: bool,
    ) -> None:
        backbone = networks.student.backbone
        student = recipe.student
        tokens = sum(n * each for n, each in zip(counts, _tokens(recipe, networks), strict=True))
        rate = student.drop_path_rate if student.drop_path_uniform else student.drop_path_rate / 2
        branch = tokens * (1 - rate)  # tokens that a residual branch sees

        size, width, depth = precision.itemsize, backbone.embed_dim, len(backbone.blocks)
        fast = device.type == "cpu" and recipe.parallel.kernels != "plain"
        block = cast(Block, backbone.blocks[0])
        kept = _kept_by_fast(block, precision) if fast else _kept_by_plain(block, precision, groups=2 - (0 in counts))
        of_a_block = branch * kept.by_token + kept.by_block
        stream = tokens * width * 4
        wanted = sum(counts) + counts[0] * _masked_patches(recipe, networks)
        of_the_last = branch * kept.by_token_before + wanted * (1 - rate) * kept.by_token_after + kept.by_block
        heads = wanted * self._of_heads(recipe, size, fast)
        if recipe.parallel.activation_checkpointing:
            # The inputs of all blocks but the last, which is done; one block made again, and the gradient in it.
            inputs = float((depth - 1) * stream)
            self.one_block: float = stream
            shared = stream if size == 4 and branch == tokens else 0.0  # what its LayerNorm reads is the input itself
            self.working = of_a_block - shared + branch * size * _hidden(block.mlp) + stream
        else:
            inputs = (depth - 1) * of_a_block + of_the_last
            self.one_block = of_a_block
            self.working = branch * size * 3 * width + stream
        if not fast and branch < tokens:
            self.working += stream  # the gradient of the rows that a branch takes, laid among zeros
        self.activations = inputs + heads
        if fast:
            self.losses = self._scratch(recipe, networks, precision, wanted, in_turn)
            self.teacher = self.after_losses = self.losses
        else:
            self.teacher, self.losses, self.after_losses = self._plain_losses(
                recipe, networks, precision, counts, in_turn
            )
        # As uint8, as float32, and in half precision for the patch embedding.
        self.batch = _values_of_batch(recipe) * (5 + (2 if size == 2 else 0))

    @staticmethod
    def _of_heads(recipe: Recipe, size: int, fast: bool) -> float:
        """Bytes of a sample: what each GELU of the MLP reads, or gives as well, and the bottleneck."""
        d = recipe.dino
        return (d.head_nlayers - 1) * d.head_hidden_dim * size * (1 if fast else 2) + 4 * 4 * d.head_bottleneck_dim

    @staticmethod
    def _scratch(recipe: Recipe, networks: StudentTeacher, precision: torch.dtype, seen: float, in_turn: bool) -> float:
        """The memory that the losses keep: targets, an effective weight, a chunk of the student's logits.

        Between turns, each head's weight is kept.
        """
        size = _last_layer_size(precision)
        targets, weights, chunks = 0.0, [0.0], [0.0]
        for prototypes, width, samples in _last_layers(recipe, networks):
            targets += prototypes * samples * size
            weights.append(prototypes * width * size)
            chunks.append(prototypes * min(seen, columns_at_once(prototypes, precision)) * size)
        kept = sum(weights) if in_turn else max(weights)
        return (1 + SPARE) * (targets + kept + max(chunks))

    @staticmethod
    def _plain_losses(
        recipe: Recipe, networks: StudentTeacher, precision: torch.dtype, counts: tuple[int, int], in_turn: bool
    ) -> tuple[float, float, float]:
        """What the losses take when the teacher has made its targets, in their backward pass, and after it."""
        size = _last_layer_size(precision)
        targets, making, weights, chunks = 0.0, [0.0], 0.0, [0.0]
        for prototypes, width, samples in _last_layers(recipe, networks):
            targets += prototypes * samples * size
            # The logits in float32, and what is computed of them; of the targets, only they themselves are left.
            making.append(prototypes * samples * 8)
            weights += prototypes * width * 4
            # A chunk has samples of one term, whose logits, their softmax, targets and gradient are float32.
            columns = min(max(*counts, counts[0] * _masked_patches(recipe, networks)), plain.LOGITS / prototypes)
            chunks.append(prototypes * (columns * (3 * 4 + size) + width * (4 + size)))  # the weight's gradient, a copy
        return targets + max(making), targets + weights + max(chunks), targets if in_turn else 0.0


class _Kept(NamedTuple):
    """Bytes that blocks keep for their backward pass.

    by_token: of each token that a block's branches see.
    by_token_before, by_token_after: the same of the last block, before and after attention, where it is narrowed.
    by_block: copies of its weights.
    """

    by_token: float
    by_token_before: float
    by_token_after: float
    by_block: float


def _kept_by_fast(block: Block, precision: torch.dtype) -> _Kept:
    """What the fast twins keep: what both LayerNorms read, queries, keys and values, and what attention gave."""
    size, width, hidden = precision.itemsize, block.attn.qkv.in_features, _hidden(block.mlp)
    keeps_attended = size == 4  # in half precision attention keeps only what came in
    unscaled = _unscaled(block, precision)
    return _Kept(
        by_token=size * (2 * width + 3 * width + width + hidden) + unscaled,
        by_token_before=size * (4 * width + (width if keeps_attended else 0)),
        by_token_after=size * (2 * width + hidden) + unscaled,
        by_block=0.0,
    )


def _kept_by_plain(block: Block, precision: torch.dtype, groups: int) -> _Kept:
    """What the plain definitions keep, not compiled: more of each token, and copies of weights.

    Of each LayerNorm what it reads, in float32, and what it gives; queries, keys and values; what attention gave, twice
    if it is put together from the crops of each size; what the GELU reads and what it gives.
    """
    size, width, hidden = precision.itemsize, block.attn.qkv.in_features, _hidden(block.mlp)
    if isinstance(block.mlp, Mlp):
        hidden *= 2
    unscaled = 2 * width * size if precision is torch.float16 and block.ls1 is not None else 0
    norm = 4 * width + size * width
    weights = 0.0
    for name, parameter in block.named_parameters():
        if name.endswith(".weight") and parameter.dim() == 2:
            is_scaled = name.startswith(("attn.proj", "mlp.fc2", "mlp.w3")) and block.ls1 is not None
            weights += parameter.numel() * size * (size == 2 or is_scaled)
    return _Kept(
        by_token=2 * norm + size * (3 * width + groups * width + hidden) + unscaled,
        by_token_before=norm + size * (3 * width + width),
        by_token_after=norm + size * (width + hidden) + 2 * 4 * width + unscaled,
        by_block=weights,
    )


def _unscaled(block: Block, precision: torch.dtype) -> float:
    """Bytes of a token that LayerScale multiplies in float16, and what the GELU gave: see ``kernels.ops``."""
    if precision is not torch.float16 or block.ls1 is None:
        return 0.0
    gelu = block.mlp.fc1.out_features if isinstance(block.mlp, Mlp) else 0
    return precision.itemsize * (2 * block.attn.qkv.in_features + gelu)


def _last_layers(recipe: Recipe, networks: StudentTeacher) -> Iterator[tuple[int, int, float]]:
    """Of each head: prototypes, width of the bottleneck, and samples of the teacher."""
    crops = 2.0 * recipe.train.batch_size_per_gpu
    masked = crops * _masked_patches(recipe, networks)
    samples = {"dino_head": crops, networks.student.patch_head_name: masked}
    if networks.student.patch_head_name == "dino_head":
        samples = {"dino_head": crops + masked}
    for name, head in networks.student.heads.items():
        prototypes, width = head.last_layer.weight_v.shape
        yield prototypes, width, samples[name]


def _last_layer_size(precision: torch.dtype) -> int:
    """Bytes of a logit; in float16, last layers compute in float32."""
    return 4 if precision is torch.float16 else precision.itemsize


def _tokens(recipe: Recipe, networks: StudentTeacher) -> tuple[int, int]:
    """Numbers of tokens of a global and of a local crop."""
    backbone = networks.student.backbone
    sizes = (recipe.crops.global_crops_size, recipe.crops.local_crops_size)
    of_global, of_local = (backbone.tokens_of((size, size)) for size in sizes)
    return of_global, of_local


def _masked_patches(recipe: Recipe, networks: StudentTeacher) -> float:
    """Average number of masked patches of a global crop, where a loss reads them."""
    ibot = recipe.ibot
    patches = (recipe.crops.global_crops_size // recipe.student.patch_size) ** 2
    share = ibot.mask_sample_probability * sum(ibot.mask_ratio_min_max) / 2
    return patches * share if networks.objective.has_ibot else 0.0


def _hidden(mlp: Mlp | SwiGLU) -> float:
    """Values of a token that the feed-forward network keeps."""
    if isinstance(mlp, SwiGLU):
        return 4 * mlp.w3.in_features  # gate and value, the gate's SiLU, their product
    return mlp.fc1.out_features
