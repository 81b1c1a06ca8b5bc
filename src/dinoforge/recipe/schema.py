"""The keys of a recipe: names, types, defaults."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dinoforge.errors import RecipeError

Targets = Literal["centering", "sinkhorn_knopp"]


@dataclass(frozen=True)
class Dino:
    loss_weight: float = 1.0  # 0 switches global and local term off
    global_loss_weight: float = 1.0  # ours: on top of loss_weight
    local_loss_weight: float = 1.0  # ours: on top of loss_weight
    head_n_prototypes: int = 65536
    head_bottleneck_dim: int = 256
    head_nlayers: int = 3
    head_hidden_dim: int = 2048
    koleo_loss_weight: float = 0.1
    targets: Targets | None = None  # ours: null takes train.centering
    student_temp: float = 0.1  # ours: a constant of the reference's DINOLoss
    center_momentum: float = 0.9  # ours: a constant of the reference's DINOLoss; 1: the centre stays 0
    koleo_scope: Literal["rank", "global", "groups"] = "rank"  # ours: where neighbours are sought; see docs/running.md
    koleo_group_size: int | None = None  # ours: consecutive images of the global batch, for koleo_scope=groups


@dataclass(frozen=True)
class Ibot:
    loss_weight: float = 1.0
    mask_sample_probability: float = 0.5  # share of the global crops that are masked at all
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)  # equal bounds: one fixed ratio
    mask_kind: Literal["block", "bernoulli"] = "block"  # ours: the reference's generator, or each token by itself
    mask_min_patches: int = 4  # ours: smallest block; a constant of the reference
    mask_min_aspect: float = 0.3  # ours: blocks' aspect ratio in [a, 1/a]; a constant of the reference
    separate_head: bool = False
    head_n_prototypes: int = 65536
    head_bottleneck_dim: int = 256
    head_nlayers: int = 3
    head_hidden_dim: int = 2048
    targets: Targets | None = None  # ours: null takes train.centering
    student_temp: float = 0.1  # ours: a constant of the reference's iBOTPatchLoss
    center_momentum: float = 0.9  # ours: a constant of the reference's iBOTPatchLoss; 1: the centre stays 0
    center_mean: Literal["ranks", "patches"] = "ranks"  # ours: mean of the ranks' means, or over all masked patches


@dataclass(frozen=True)
class Train:
    batch_size_per_gpu: int = 64  # images of a rank that are computed at once
    accumulate: int = 1  # ours: so many of these make a rank's part of a step
    batch_size: int | None = None  # ours: images of a step over all ranks; wins over batch_size_per_gpu
    centering: Targets = "centering"
    OFFICIAL_EPOCH_LENGTH: int = 1250  # steps of a nominal epoch: the unit of every *_epochs key
    seed: int = 0
    num_workers: int | None = 10  # no more than there are processors; null: chosen for the device
    sinkhorn_iterations: int = 3  # ours: a constant of the reference
    steps: int | None = None  # ours: length of the run in optimizer steps
    epochs: float | None = None  # ours: or in passes over the user's images; neither: optim.epochs nominal epochs
    max_minutes: float | None = None  # ours: stop with a checkpoint after that long; schedules do not change
    threads: int | None = None  # ours: compute threads; null: all processors, or on an accelerator a few
    max_skips: int = 3  # ours: steps in a row without finite loss and gradients; then back to the last checkpoint
    max_rollbacks: int = 3  # ours: that many times; then the run ends


@dataclass(frozen=True)
class Student:
    arch: str = "vit_large"  # vit_tiny | vit_small | vit_base | vit_large | vit_giant2 | vit_custom
    embed_dim: int | None = None  # ours: the sizes of vit_custom
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0  # ours: 4 in every published size
    in_chans: int = 3  # ours: channels of the images
    patch_size: int = 16
    drop_path_rate: float = 0.3
    drop_path_uniform: bool = True  # false: rising linearly with depth
    layerscale: float = 1.0e-05  # initial value; 0: no LayerScale
    ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = "mlp"
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    num_register_tokens: int = 0
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1


@dataclass(frozen=True)
class Teacher:
    momentum_teacher: float = 0.992
    final_momentum_teacher: float = 1.0
    frozen_momentum_teacher: float | None = None  # ours: while the backbone is frozen; null: as at any step
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.07
    warmup_teacher_temp_epochs: float = 30
    warmup_teacher_temp_length: str | None = None  # ours: a length such as "30%"; wins over the epochs


@dataclass(frozen=True)
class Optim:
    epochs: float = 100
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    weight_decay_scope: Literal["all", "backbone"] = "all"  # ours: backbone leaves the heads at AdamW's 0.01
    base_lr: float = 0.004  # for a batch of 1024
    scaling_rule: Literal["sqrt_wrt_1024", "none"] = "sqrt_wrt_1024"
    warmup_epochs: float = 10
    warmup_length: str | None = None  # ours: a length such as "10%" or "500 steps"; wins over the epochs
    min_lr: float = 1.0e-06
    clip_grad: float = 3.0  # per sub-network; 0: no clipping
    freeze_last_layer_epochs: float = 1
    freeze_last_layer_length: str | None = None  # ours: a length; wins over the epochs
    freeze_last_layer: Literal["lr", "gradient"] = "lr"  # ours: lr is the reference's way
    freeze_backbone_length: str | None = None  # ours: a length in which only heads learn; null: none
    patch_embed_lr_mult: float = 0.2
    layerwise_decay: float = 0.9
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.999


@dataclass(frozen=True)
class Crops:
    global_crops_scale: tuple[float, float] = (0.32, 1.0)
    local_crops_number: int = 8
    local_crops_scale: tuple[float, float] = (0.05, 0.32)
    global_crops_size: int = 224
    local_crops_size: int = 96
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # ours: a default of RandomResizedCrop


@dataclass(frozen=True)
class Augment:
    """Ours: the constants of the reference's augmentation."""

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0  # probability that a crop is turned by 90, 180 or 270 degrees, each as likely
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur: Literal["released", "stated"] = "released"  # a probability is inverted in the released code
    blur_probability: tuple[float, float, float] | None = None  # first global, second global, local; null: by blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize_probability: float = 0.2  # second global crop only
    solarize_threshold: int = 128
    device: Literal["workers", "train"] = "workers"  # where colours are changed, blurred and solarized


@dataclass(frozen=True)
class Data:
    """Ours: how a file becomes an array, and what is borne with."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's, on the range 0..1; one value serves all channels
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    range: tuple[float, ...] | None = (
        None  # low, high that become 0 and 255; or a pair for each channel; null: measured
    )
    sixteen_bit: Literal["full", "minmax"] = "full"  # without a range: full: value / 257; minmax: each image's own
    nodata: float | None = None  # a value that means no data, beside the file's own
    fill: int = 0  # level of what has no data, 0 to 255
    plane: str | None = (
        None  # of a file with several (z, time): a number from 0; max: the brightest; each: every one; null: the first
    )
    max_pixels: int = 178_956_970  # larger images are refused
    reduced_decode: bool = False  # decode a large JPEG only at the scale that its crops need
    max_bad_share: float = 0.1  # of the images; above it the run stops
    timeout: float = 600.0  # seconds for a batch; then a worker hangs, and the run stops


@dataclass(frozen=True)
class Init:
    """Ours: what student and teacher start from."""

    weights: str | None = None  # a run, a file or a Hugging Face folder; null: random weights
    in_chans: Literal["repeat", "mean", "fresh"] | None = None  # for another number of channels; null: refuse
    architecture: Literal["recipe", "file"] = (
        "recipe"  # file: student.*, crop sizes, mean and std not given are its own
    )
    enlarge: float = 1.0  # with architecture: file, crops are so many times as large as its own
    heads: Literal["fresh", "run"] = "fresh"  # run: heads and centres of the run's checkpoint, where weights is a run


@dataclass(frozen=True)
class Eval:
    """Ours: how an image is shown to the network for evaluation."""

    size: int | None = None  # side in pixels; null: crops.global_crops_size
    crop: bool = False  # true: the official centre crop; false: the whole image


@dataclass(frozen=True)
class Probe:
    """Ours: how the teacher is measured while it trains, where images have labels; see docs/evaluation.md."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0  # at the first logged step after so long; both null: no probes
    max_images: int = 2000  # that are looked at
    patience: int | None = None  # so many probes without a better k-NN end the run; null: never

    @property
    def is_on(self) -> bool:
        return self.every_steps is not None or self.every_minutes is not None


@dataclass(frozen=True)
class Checkpoint:
    """Ours: when the run is saved."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep_last: int = 2
    keep_every: int | None = None  # additionally keep every checkpoint whose step is a multiple
    asynchronous: bool = True  # write while training goes on; takes memory for a copy of what is written


@dataclass(frozen=True)
class Log:
    """Ours: what is written while it runs."""

    every_steps: int = 10
    tensorboard: bool = False


@dataclass(frozen=True)
class Report:
    """Ours: the page that a run writes about itself, RUN/report.html."""

    every_minutes: float | None = 5.0  # and at the end; null: only by ``dinoforge report``
    channels: tuple[int, ...] | None = None  # shown as red, green, blue, or one as grey, from 0; null: the first three


@dataclass(frozen=True)
class Parallel:
    """Ours: how a run is laid over ranks and computed; nothing here changes what is computed."""

    mode: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # auto: sharded only if it would not fit
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # auto: nccl on cuda, gloo on the CPU
    shard_ranks: int | None = None  # of a copy under hsdp; null: the ranks of a machine
    activation_checkpointing: bool = False  # less memory, about a third more work
    crops_in_turn: bool | None = None  # some crops at a time: less memory; null: see docs/running.md
    kernels: Literal["auto", "fast", "plain"] = "auto"  # auto: the fast ones on a CPU, else PyTorch's own
    timeout_minutes: float = 30.0  # after so long without a word from a rank, the others take it for gone


@dataclass(frozen=True)
class Recipe:
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: what the device multiplies fastest
    allow_tf32: bool = False  # CUDA: products and convolutions of float32 may round their factors to 10 bits
    device: str = "auto"  # auto: cuda, then mps, then cpu
    dino: Dino = field(default_factory=Dino)
    ibot: Ibot = field(default_factory=Ibot)
    train: Train = field(default_factory=Train)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    optim: Optim = field(default_factory=Optim)
    crops: Crops = field(default_factory=Crops)
    augment: Augment = field(default_factory=Augment)
    data: Data = field(default_factory=Data)
    init: Init = field(default_factory=Init)
    eval: Eval = field(default_factory=Eval)
    probe: Probe = field(default_factory=Probe)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    parallel: Parallel = field(default_factory=Parallel)
    log: Log = field(default_factory=Log)
    report: Report = field(default_factory=Report)


# Keys of official files that mean nothing here: accepted, and listed once with the reason.
WITHOUT_MEANING: dict[str, str] = {
    "MODEL": "a checkpoint of the run itself is found in the run directory",
    "compute_precision": "see precision",
    "train.dataset_path": "the data is named on the command line",
    "train.output_dir": "see --out",
    "train.saveckp_freq": "see checkpoint.every_steps and checkpoint.every_minutes",
    "train.cache_dataset": "the index of a folder is kept in memory",
    "student.block_chunks": "only the layout of the reference's FSDP checkpoints depends on it",
    "optim.lr": "computed from optim.base_lr, optim.scaling_rule and the batch size",
    "evaluation": "see eval",
}

# Keys that may differ between a run and its continuation. How the global batch is cut is one, what it is in all is not.
FREE_KEYS = (
    "train.batch_size",  # and batch_size_per_gpu
    "train.accumulate",
    "train.threads",
    "parallel.",
    "train.num_workers",
    "train.max_minutes",
    "train.max_skips",
    "train.max_rollbacks",
    "data.timeout",
    "checkpoint.",
    "log.",
    "report.",
    "eval.",
    "probe.",
)

# Of each group, a layer (file, command line) that names one key takes the others' values of lower layers away.
ALTERNATIVES = (
    ("train.steps", "train.epochs", "optim.epochs"),
    ("optim.warmup_length", "optim.warmup_epochs"),
    ("optim.freeze_last_layer_length", "optim.freeze_last_layer_epochs"),
    ("teacher.warmup_teacher_temp_length", "teacher.warmup_teacher_temp_epochs"),
)

SECTIONS: dict[str, type] = {
    f.name: typing.cast(type, f.type) for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)
}
TYPES: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in SECTIONS} | {
    f"{section}.{key}": hint for section, cls in SECTIONS.items() for key, hint in typing.get_type_hints(cls).items()
}


@dataclass(frozen=True)
class Length:
    """A length of a schedule: an amount with its unit."""

    amount: float
    unit: Literal["steps", "epochs", "official epochs", "%"]

    def steps(self, total_steps: int, steps_per_epoch: float, official_epoch_length: int) -> int:
        """The length in steps of a run; epochs are passes over the user's images."""
        unit = {"steps": 1.0, "epochs": steps_per_epoch, "official epochs": official_epoch_length}
        return round(self.amount * (total_steps / 100 if self.unit == "%" else unit[self.unit]))


def parse_length(text: str) -> Length:
    """Reads ``"500 steps"``, ``"2 epochs"`` (of the user's images), ``"2 official epochs"`` or ``"10%"``."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(steps?|epochs?|official epochs?|%)\s*", text)
    try:
        amount = float(match[1]) if match else -1.0
    except ValueError:
        amount = -1.0
    if match is None or not 0 <= amount < float("inf") or (match[2] == "%" and amount > 100):
        raise RecipeError(
            f"{text!r} is not a length: expected '500 steps', '2 epochs' (of your images), '2 official epochs' "
            "or '10%' (of the run)"
        )
    unit = match[2] if match[2] == "%" else match[2].rstrip("s") + "s"
    return Length(amount, typing.cast(Any, unit))


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as dotted keys: ``{"train.seed": 0, …}``."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if f.name in SECTIONS:
            flat |= {f"{f.name}.{key.name}": getattr(value, key.name) for key in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def differences(a: Recipe, b: Recipe, *, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, apart from those that start with one of ``ignore``."""
    flat_a, flat_b = flatten(a), flatten(b)
    return {k: (v, flat_b[k]) for k, v in flat_a.items() if v != flat_b[k] and not k.startswith(ignore)}
