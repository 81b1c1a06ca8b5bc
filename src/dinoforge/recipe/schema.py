"""The keys of a recipe: names, types, defaults, bounds and meanings."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dinoforge.errors import RecipeError
from dinoforge.recipe.bounds import (
    ABOVE_0,
    ABOVE_0_IN_ORDER,
    CROP_SCALES,
    EACH_ABOVE_0,
    EACH_FROM_0,
    EACH_SHARE,
    FINITE,
    FROM_0,
    FROM_1,
    FROM_2,
    HUE,
    LEVEL,
    ODD,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    SHARES_IN_ORDER,
    Bounds,
    key,
)

Targets = Literal["centering", "sinkhorn_knopp"]


@dataclass(frozen=True)
class Dino:
    """The loss on cls tokens, its head, and KoLeo."""

    loss_weight: float = key(1.0, "Weight of the global and the local term; 0 switches both off.", FROM_0)
    global_loss_weight: float = key(1.0, "Ours: weight of the global term, on top of loss_weight.", FROM_0)
    local_loss_weight: float = key(1.0, "Ours: weight of the local term, on top of loss_weight.", FROM_0)
    head_n_prototypes: int = key(65536, "Prototypes: outputs of the head.", FROM_1)
    head_bottleneck_dim: int = key(256, "Width of the head's output before the prototypes.", FROM_1)
    head_nlayers: int = key(3, "Layers of the head's MLP.", FROM_1)
    head_hidden_dim: int = key(2048, "Width of the head's hidden layers.", FROM_1)
    koleo_loss_weight: float = key(0.1, "Weight of the KoLeo term; 0 switches it off.", FROM_0)
    targets: Targets | None = key(None, "Ours: how targets are made; null: as train.centering says.")
    student_temp: float = key(0.1, "Ours: the student's temperature, a constant of the reference's DINOLoss.", ABOVE_0)
    center_momentum: float = key(
        0.9, "Ours: momentum of the centre, a constant of the reference's DINOLoss; 1: the centre stays 0.", SHARE
    )
    koleo_scope: Literal["rank", "global", "groups"] = key(
        "rank", "Ours: the images among which KoLeo seeks nearest neighbours; see docs/running.md."
    )
    koleo_group_size: int | None = key(
        None, "Ours: consecutive images of the global batch that form a group, for koleo_scope=groups.", FROM_2
    )


@dataclass(frozen=True)
class Ibot:
    """The loss on masked patch tokens, its masks, and its head."""

    loss_weight: float = key(1.0, "Weight of the term; 0 switches it off.", FROM_0)
    mask_sample_probability: float = key(0.5, "Share of the global crops that are masked at all.", SHARE)
    mask_ratio_min_max: tuple[float, float] = key(
        (0.1, 0.5), "Lowest and highest share of a masked crop's patches; equal: one fixed ratio.", SHARES_IN_ORDER
    )
    mask_kind: Literal["block", "bernoulli"] = key(
        "block", "Ours: block: the reference's generator; bernoulli: each patch by itself."
    )
    mask_min_patches: int = key(4, "Ours: patches of the smallest block, a constant of the reference.", FROM_1)
    mask_min_aspect: float = key(
        0.3, "Ours: blocks have an aspect ratio in [a, 1/a]; a constant of the reference.", SHARE_ABOVE_0
    )
    separate_head: bool = key(False, "Whether iBOT has a head of its own; false: the head of section dino.")
    head_n_prototypes: int = key(65536, "Prototypes of a separate head.", FROM_1)
    head_bottleneck_dim: int = key(256, "Width of a separate head's output before the prototypes.", FROM_1)
    head_nlayers: int = key(3, "Layers of a separate head's MLP.", FROM_1)
    head_hidden_dim: int = key(2048, "Width of a separate head's hidden layers.", FROM_1)
    targets: Targets | None = key(None, "Ours: how targets are made; null: as train.centering says.")
    student_temp: float = key(
        0.1, "Ours: the student's temperature, a constant of the reference's iBOTPatchLoss.", ABOVE_0
    )
    center_momentum: float = key(
        0.9, "Ours: momentum of the centre, a constant of the reference's iBOTPatchLoss; 1: the centre stays 0.", SHARE
    )
    center_mean: Literal["ranks", "patches"] = key(
        "ranks", "Ours: ranks: the centre is the mean of the ranks' means; patches: the mean of all masked patches."
    )


@dataclass(frozen=True)
class Train:
    """Batch, length, seed, and what the run does about faults."""

    batch_size_per_gpu: int = key(64, "Images that a rank computes at once.", FROM_1)
    accumulate: int = key(1, "Ours: batches of batch_size_per_gpu that make a rank's part of a step.", FROM_1)
    batch_size: int | None = key(None, "Ours: images of a step over all ranks; wins over batch_size_per_gpu.", FROM_1)
    centering: Targets = key("centering", "How the targets of both losses are made.")
    OFFICIAL_EPOCH_LENGTH: int = key(1250, "Steps of a nominal epoch, the unit of every *_epochs key.", FROM_1)
    seed: int = key(0, "Seed of the data order, augmentations, masks and initial weights.", SEED)
    num_workers: int | None = key(
        10, "Data workers of a rank, at most as many as processors; null: chosen for the device.", FROM_0
    )
    sinkhorn_iterations: int = key(3, "Ours: iterations of Sinkhorn-Knopp, a constant of the reference.", FROM_1)
    steps: int | None = key(None, "Ours: length of the run in optimizer steps.", FROM_1)
    epochs: float | None = key(
        None,
        "Ours: length of the run in passes over the user's images; without steps and epochs, optim.epochs decides.",
        ABOVE_0,
    )
    max_minutes: float | None = key(
        None, "Ours: minutes after which the run stops with a checkpoint; schedules do not change.", ABOVE_0
    )
    threads: int | None = key(None, "Ours: compute threads; null: all processors, or on an accelerator a few.", FROM_1)
    max_skips: int = key(
        3,
        "Ours: steps in a row without finite loss and gradients; then the run returns to its last checkpoint.",
        FROM_1,
    )
    max_rollbacks: int = key(3, "Ours: returns to the last checkpoint; then the run ends.", FROM_0)


@dataclass(frozen=True)
class Student:
    """The architecture of the backbone."""

    arch: str = key("vit_large", "vit_tiny, vit_small, vit_base, vit_large, vit_giant2 or vit_custom.")
    embed_dim: int | None = key(None, "Ours: width of vit_custom.", FROM_1)
    depth: int | None = key(None, "Ours: blocks of vit_custom.", FROM_1)
    num_heads: int | None = key(None, "Ours: attention heads of vit_custom.", FROM_1)
    mlp_ratio: float = key(4.0, "Ours: hidden width of an MLP over its input's; 4 in every published size.", ABOVE_0)
    in_chans: int = key(3, "Ours: channels of the images.", FROM_1)
    patch_size: int = key(16, "Side of a patch in pixels.", FROM_1)
    drop_path_rate: float = key(0.3, "Rate of stochastic depth.", SHARE_BELOW_1)
    drop_path_uniform: bool = key(True, "Whether all blocks have the same rate; false: it rises linearly with depth.")
    layerscale: float = key(1.0e-05, "Initial value of LayerScale; 0: no LayerScale.", FROM_0)
    ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = key(
        "mlp", "Feed-forward layer of a block; swiglufused is swiglu under the reference's name."
    )
    qkv_bias: bool = key(True, "Whether the projection to query, key and value has a bias.")
    proj_bias: bool = key(True, "Whether the projection after attention has a bias.")
    ffn_bias: bool = key(True, "Whether feed-forward layers have biases.")
    num_register_tokens: int = key(0, "Register tokens.", FROM_0)
    interpolate_antialias: bool = key(False, "Whether position embeddings are smoothed when they are made smaller.")
    interpolate_offset: float = key(0.1, "Offset of the grid to which position embeddings are resized.", SHARE_BELOW_1)


@dataclass(frozen=True)
class Teacher:
    """Momentum and temperature of the teacher."""

    momentum_teacher: float = key(0.992, "Momentum at the first step.", SHARE)
    final_momentum_teacher: float = key(1.0, "Momentum at the last step.", SHARE)
    frozen_momentum_teacher: float | None = key(
        None, "Ours: momentum while the backbone is frozen; null: as at any step.", SHARE
    )
    warmup_teacher_temp: float = key(0.04, "Temperature at the first step.", ABOVE_0)
    teacher_temp: float = key(0.07, "Temperature after its warm-up.", ABOVE_0)
    warmup_teacher_temp_epochs: float = key(30, "Warm-up of the temperature in nominal epochs.", FROM_0)
    warmup_teacher_temp_length: str | None = key(
        None, 'Ours: warm-up of the temperature as a length such as "30%"; wins over the epochs.'
    )


@dataclass(frozen=True)
class Optim:
    """AdamW, its schedules, and what stays frozen."""

    epochs: float = key(100, "Length of the run in nominal epochs.", ABOVE_0)
    weight_decay: float = key(0.04, "Weight decay at the first step.", FROM_0)
    weight_decay_end: float = key(0.4, "Weight decay at the last step.", FROM_0)
    weight_decay_scope: Literal["all", "backbone"] = key(
        "all", "Ours: what the schedule is for; backbone leaves the heads at AdamW's 0.01."
    )
    base_lr: float = key(0.004, "Learning rate for a batch of 1024.", ABOVE_0)
    scaling_rule: Literal["sqrt_wrt_1024", "none"] = key(
        "sqrt_wrt_1024", "How the learning rate follows the batch: by the square root of its size over 1024, or not."
    )
    warmup_epochs: float = key(10, "Warm-up of the learning rate in nominal epochs.", FROM_0)
    warmup_length: str | None = key(
        None, 'Ours: warm-up of the learning rate as a length such as "10%" or "500 steps"; wins over the epochs.'
    )
    min_lr: float = key(1.0e-06, "Learning rate at the last step.", FROM_0)
    clip_grad: float = key(3.0, "Largest gradient norm of the backbone and of each head; 0: no clipping.", FROM_0)
    freeze_last_layer_epochs: float = key(1, "Freeze of the heads' last layers in nominal epochs.", FROM_0)
    freeze_last_layer_length: str | None = key(
        None, "Ours: freeze of the heads' last layers as a length; wins over the epochs."
    )
    freeze_last_layer: Literal["lr", "gradient"] = key(
        "lr", "Ours: lr: the frozen layer's learning rate is 0, as in the reference; gradient: its gradient is dropped."
    )
    freeze_backbone_length: str | None = key(None, "Ours: a length in which only the heads learn; null: none.")
    patch_embed_lr_mult: float = key(0.2, "Multiplier of the patch embedding's learning rate.", FROM_0)
    layerwise_decay: float = key(0.9, "Factor between the learning rates of a block and the block after it.", ABOVE_0)
    adamw_beta1: float = key(0.9, "Decay of AdamW's first moment.", SHARE_BELOW_1)
    adamw_beta2: float = key(0.999, "Decay of AdamW's second moment.", SHARE_BELOW_1)


@dataclass(frozen=True)
class Crops:
    """Number and sizes of the crops of an image."""

    global_crops_scale: tuple[float, float] = key(
        (0.32, 1.0), "Lowest and highest area of a global crop, as a share of the image.", CROP_SCALES
    )
    local_crops_number: int = key(8, "Local crops of an image.", FROM_0)
    local_crops_scale: tuple[float, float] = key(
        (0.05, 0.32), "Lowest and highest area of a local crop, as a share of the image.", CROP_SCALES
    )
    global_crops_size: int = key(224, "Side of a global crop in pixels.", FROM_1)
    local_crops_size: int = key(96, "Side of a local crop in pixels.", FROM_1)
    aspect_ratio: tuple[float, float] = key(
        (3 / 4, 4 / 3), "Ours: lowest and highest aspect ratio, a default of RandomResizedCrop.", ABOVE_0_IN_ORDER
    )


@dataclass(frozen=True)
class Augment:
    """Ours: the constants of the reference's augmentation."""

    horizontal_flip: float = key(0.5, "Probability that a crop is mirrored left to right.", SHARE)
    vertical_flip: float = key(0.0, "Probability that a crop is mirrored top to bottom.", SHARE)
    quarter_turns: float = key(
        0.0, "Probability that a crop is turned by 90, 180 or 270 degrees, each as likely.", SHARE
    )
    jitter_probability: float = key(0.8, "Probability that a crop's colours are changed.", SHARE)
    brightness: float = key(0.4, "Largest change of the brightness, as a share.", FROM_0)
    contrast: float = key(0.4, "Largest change of the contrast, as a share.", FROM_0)
    saturation: float = key(0.2, "Largest change of the saturation, as a share.", FROM_0)
    hue: float = key(0.1, "Largest change of the hue, as a share of the colour circle.", HUE)
    grayscale_probability: float = key(0.2, "Probability that a crop loses its colours.", SHARE)
    blur: Literal["released", "stated"] = key(
        "released", "The released code's blur probabilities, in which one is inverted, or those that it states."
    )
    blur_probability: tuple[float, float, float] | None = key(
        None, "Blur probabilities of the first global, second global and local crops; null: as blur says.", EACH_SHARE
    )
    blur_sigma: tuple[float, float] = key(
        (0.1, 2.0), "Lowest and highest standard deviation of the blur in pixels.", ABOVE_0_IN_ORDER
    )
    blur_kernel: int = key(9, "Side of the blur's kernel in pixels.", ODD)
    solarize_probability: float = key(0.2, "Probability that a second global crop is solarized.", SHARE)
    solarize_threshold: int = key(128, "Level from which solarizing inverts values.", FINITE)
    device: Literal["workers", "train"] = key(
        "workers", "Where colours are changed, blurred and solarized: in the data workers or on the training device."
    )


@dataclass(frozen=True)
class Data:
    """Ours: how a file becomes an array, and which faults are borne."""

    mean: tuple[float, ...] = key(
        (0.485, 0.456, 0.406), "Mean of each channel on the range 0 to 1, ImageNet's; one serves all channels.", FINITE
    )
    std: tuple[float, ...] = key((0.229, 0.224, 0.225), "Standard deviation of each channel, likewise.", EACH_ABOVE_0)
    range: tuple[float, ...] | None = key(
        None, "Values that become 0 and 255: low, high, or such a pair for each channel; null: measured.", FINITE
    )
    sixteen_bit: Literal["full", "minmax"] = key(
        "full", "Images of 16 bits without a range: full: the value over 257; minmax: each image's own range."
    )
    nodata: float | None = key(None, "A value that means no data, beside the file's own.", FINITE)
    fill: int = key(0, "Level of pixels without data.", LEVEL)
    plane: str | None = key(
        None,
        "Plane of a file with several (z, time): a number from 0; max: the brightest; each: every one; "
        "null: the first.",
    )
    max_pixels: int = key(178_956_970, "Pixels above which an image is refused, Pillow's limit.", FROM_1)
    reduced_decode: bool = key(False, "Whether a large JPEG is decoded only at the scale that its crops need.")
    max_bad_share: float = key(0.1, "Share of bad images above which the run stops.", SHARE)
    timeout: float = key(600.0, "Seconds without a batch after which a worker is taken to hang.", ABOVE_0)


@dataclass(frozen=True)
class Init:
    """Ours: what student and teacher start from."""

    weights: str | None = key(None, "A run, a file or a Hugging Face folder; null: random weights.")
    in_chans: Literal["repeat", "mean", "fresh"] | None = key(
        None, "How weights for another number of channels are fitted; null: refused."
    )
    architecture: Literal["recipe", "file"] = key(
        "recipe", "file: keys of student, crop sizes, mean and std that are not given come from the file."
    )
    enlarge: float = key(1.0, "With architecture=file: crop sizes over the file's.", ABOVE_0)
    heads: Literal["fresh", "run"] = key(
        "fresh", "run: heads and centres of the run's checkpoint, where weights is a run."
    )


@dataclass(frozen=True)
class Eval:
    """Ours: how an image is shown to the network for evaluation."""

    size: int | None = key(None, "Side in pixels; null: crops.global_crops_size.", FROM_1)
    crop: bool = key(False, "true: the official centre crop; false: the whole image.")


@dataclass(frozen=True)
class Probe:
    """Ours: how the teacher is measured while it trains, where images have labels; see docs/evaluation.md."""

    every_steps: int | None = key(None, "Steps between probes.", FROM_1)
    every_minutes: float | None = key(
        10.0, "Minutes after which the next logged step has a probe; both null: no probes.", ABOVE_0
    )
    max_images: int = key(2000, "Images of a probe.", FROM_1)
    patience: int | None = key(None, "Probes without a better k-NN that end the run; null: never.", FROM_1)

    @property
    def is_on(self) -> bool:
        return self.every_steps is not None or self.every_minutes is not None


@dataclass(frozen=True)
class Checkpoint:
    """Ours: when the run is saved."""

    every_steps: int | None = key(None, "Steps between checkpoints; null: by minutes alone.", FROM_1)
    every_minutes: float | None = key(10.0, "Minutes between checkpoints; null: by steps alone.", ABOVE_0)
    keep_last: int = key(2, "Latest checkpoints that are kept.", FROM_1)
    keep_every: int | None = key(None, "Checkpoints at multiples of so many steps are kept as well.", FROM_1)
    asynchronous: bool = key(
        True, "Whether training goes on while a checkpoint is written; takes memory for a copy of it."
    )


@dataclass(frozen=True)
class Log:
    """Ours: what is written while it runs."""

    every_steps: int = key(10, "Steps between lines of metrics.", FROM_1)
    tensorboard: bool = key(False, "Whether TensorBoard's files are written too.")


@dataclass(frozen=True)
class Report:
    """Ours: the page that a run writes about itself, RUN/report.html."""

    every_minutes: float | None = key(
        5.0, "Minutes between updates, with another at the end; null: only by ``dinoforge report``.", ABOVE_0
    )
    channels: tuple[int, ...] | None = key(
        None, "Channels shown as red, green, blue, or one as grey, from 0; null: the first three.", EACH_FROM_0
    )


@dataclass(frozen=True)
class Parallel:
    """Ours: how a run is laid over ranks and computed; nothing here changes what is computed."""

    mode: Literal["auto", "ddp", "fsdp", "hsdp"] = key("auto", "auto: sharded only if it would not fit otherwise.")
    backend: Literal["auto", "gloo", "nccl"] = key("auto", "auto: nccl on cuda, gloo on the CPU.")
    shard_ranks: int | None = key(
        None, "Ranks that share a copy of the weights under hsdp; null: the ranks of a machine.", FROM_1
    )
    activation_checkpointing: bool = key(False, "Less memory for about a third more work.")
    crops_in_turn: bool | None = key(None, "Some crops at a time, for less memory; null: see docs/running.md.")
    kernels: Literal["auto", "fast", "plain"] = key(
        "auto", "The arithmetic: auto: the fast kernels on a CPU, elsewhere PyTorch's own operations (plain)."
    )
    timeout_minutes: float = key(
        30.0, "Minutes without a word from a rank after which the others take it for gone.", ABOVE_0
    )


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", "auto: what the device multiplies fastest.")
    allow_tf32: bool = key(False, "CUDA: products and convolutions of float32 may round their factors to 10 bits.")
    device: str = key("auto", "auto: cuda, then mps, then cpu.")
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

# Keys that may differ between a run and its continuation: also how the global batch is cut, but not its size.
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
FIELDS: dict[str, "dataclasses.Field[Any]"] = {
    f.name: f for f in dataclasses.fields(Recipe) if f.name not in SECTIONS
} | {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
MEANINGS: dict[str, str] = {name: f.metadata["meaning"] for name, f in FIELDS.items()}
BOUNDS: dict[str, Bounds] = {name: f.metadata["bounds"] for name, f in FIELDS.items() if f.metadata["bounds"]}


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
