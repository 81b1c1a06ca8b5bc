"""The recipe: every choice of a run, typed, on one page.

Sections and keys are those of the reference's YAML files, with its default values (ViT-L/16 on ImageNet), so that
an official training file loads unchanged. Keys that the reference does not have are marked ``ours``. YAML files
hold values only; this module is the schema. A recipe is never mutated: derived values (scaled learning rate, steps
of the run) are computed in ``dinoforge.training.build``.

Nothing here imports torch, so that a mistyped key is answered at once.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

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
    """Ours: how a run is laid over ranks; nothing here changes what is computed."""

    mode: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # auto: sharded only if it would not fit
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # auto: nccl on cuda, gloo on the CPU
    shard_ranks: int | None = None  # of a copy under hsdp; null: the ranks of a machine
    activation_checkpointing: bool = False  # less memory, about a third more work
    crops_in_turn: bool | None = None  # some crops at a time: less memory; null: see docs/running.md
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
_ALTERNATIVES = (
    ("train.steps", "train.epochs", "optim.epochs"),
    ("optim.warmup_length", "optim.warmup_epochs"),
    ("optim.freeze_last_layer_length", "optim.freeze_last_layer_epochs"),
    ("teacher.warmup_teacher_temp_length", "teacher.warmup_teacher_temp_epochs"),
)

_SECTIONS: dict[str, type] = {
    f.name: typing.cast(type, f.type) for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)
}
_TYPES: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Recipe) if f.name not in _SECTIONS} | {
    f"{section}.{key}": hint for section, cls in _SECTIONS.items() for key, hint in typing.get_type_hints(cls).items()
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


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipe_folder().iterdir() if p.name.endswith(".yaml"))


def load_recipe(
    recipe: str | Path | Recipe = "dinov2",
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    beneath: Mapping[str, Any] | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """A recipe by name or file, with overrides on top.

    Args:
        recipe: a name of ``recipe_names()``, a YAML file of ours or of the reference, or a recipe.
        overrides: ``"section.key=value"`` strings, or a mapping from dotted keys to values.
        beneath: values of the file in ``init.weights`` by dotted keys; whatever the recipe says lies over them. As long
            as a recipe with ``init.architecture: file`` has none, what depends on them is not checked.

    Returns:
        The recipe, and the keys that were given but have no meaning here, each with the reason.

    Raises:
        RecipeError: an unknown recipe or key (the nearest one is named), a wrong type, a contradiction.
    """
    values = dict(beneath or {}) | (flatten(recipe) if isinstance(recipe, Recipe) else {})
    ignored: dict[str, str] = {}
    if not isinstance(recipe, Recipe):
        for layer in _layers(recipe):
            ignored |= _merge(values, layer)
    given = dict(overrides) if isinstance(overrides, Mapping) else dict(parse_override(text) for text in overrides)
    ignored |= _merge(values, given)
    result = _build(values)
    _validate(result)
    if result.init.architecture == "recipe" or beneath is not None:
        _validate_sizes(result)
    return result, ignored


def base_of(recipe: str | Path | Recipe) -> str:
    """Which recipe of ``recipe_names()`` a readable one is, or its file names as ``base``; without, the defaults."""
    if isinstance(recipe, Recipe):
        return "dinov2"
    if str(recipe) in recipe_names():
        return str(recipe)
    return str(_read_yaml(Path(recipe).read_text(encoding="utf-8"), Path(recipe)).get("base", "dinov2"))


def converted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as the types of their keys, not yet held against each other.

    Raises:
        RecipeError: an unknown key or a wrong type.
    """
    values: dict[str, Any] = {}
    _merge(values, overrides)
    return values


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as dotted keys: ``{"train.seed": 0, …}``."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if f.name in _SECTIONS:
            flat |= {f"{f.name}.{key.name}": getattr(value, key.name) for key in dataclasses.fields(value)}
        else:
            flat[f.name] = value
    return flat


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that ``load_recipe`` reads back to an equal recipe."""
    plain = dataclasses.asdict(recipe, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def differences(a: Recipe, b: Recipe, *, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, apart from those that start with one of ``ignore``."""
    flat_a, flat_b = flatten(a), flatten(b)
    return {k: (v, flat_b[k]) for k, v in flat_a.items() if v != flat_b[k] and not k.startswith(ignore)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _recipe_folder() -> Any:
    return resources.files("dinoforge") / "recipes"


def _layers(recipe: str | Path) -> list[dict[str, Any]]:
    """The flat values of a recipe file and, before it, of the recipe that its ``base`` names."""
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (_recipe_folder() / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    elif str(recipe) == "auto":
        raise RecipeError(
            "the recipe auto is a function of the images: dinoforge train DATA --recipe auto --dry-run shows it, and "
            "RUN/recipe.yaml has that of a run"
        )
    else:
        hint = _nearest(str(recipe), recipe_names())
        raise RecipeError(
            f"no recipe {str(recipe)!r}{hint}: expected a YAML file or one of {', '.join(recipe_names())}"
        )
    values = _read_yaml(text, path)
    base = values.pop("base", None)
    if base is not None and base not in recipe_names():
        raise RecipeError(f"{path}: base must be one of {', '.join(recipe_names())}, got {base!r}")
    return (_layers(base) if base else []) + [_flat_layer(values)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's values: 010 is ten, 1:30, yes and 2026-11-29 are text; what is left empty is not null but text.

    Raises:
        yaml.YAMLError: also for a key that stands twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name} stands there a second time", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0 if text.lstrip("+-").lower().startswith(("0x", "0o", "0b")) else 10)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL", "~nN"),
    "int": (r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Tag -> what a scalar of it looks like, and the characters that it begins with."""


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would take for something else than text."""


_Loader.yaml_implicit_resolvers, _Dumper.yaml_implicit_resolvers = {}, {}
for _tag, (_form, _starts) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_form})$"), list(_starts))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    """The sections of a recipe file.

    Raises:
        RecipeError: It is no YAML, has a key twice, or says nothing.
    """
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if values is None or values == "":
        raise RecipeError(
            f"{path} is empty: expected sections with keys, base with the name of a recipe, or {{}} for the defaults"
        )
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected sections with keys, got {type(values).__name__}")
    return values


def _flat_layer(values: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in _SECTIONS:
            if value not in (None, "") and not isinstance(value, Mapping):
                raise RecipeError(f"{name} is a section with keys, got {value!r}")
            flat |= {f"{name}.{key}": v for key, v in (value or {}).items()}
        else:
            flat[str(name)] = value
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Reads ``section.key=value``; the value is YAML, or a list as ``0.5,0.5,0.5``; a key of text takes it as it is."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise RecipeError(f"expected key=value, such as train.steps=1000, got {text!r}")
    if not value:
        raise RecipeError(
            f"{key} has no value in {text!r}, as when a shell's variable is not set: give one, or write {key}=null "
            "where there is to be none"
        )
    if _is_text(key) and value[0] not in "'\"" and value not in ("null", "~"):
        return key, value
    try:
        found = yaml.load(value, _Loader)  # a SafeLoader
        if isinstance(found, str) and "," in value and value[0] not in "'\"":
            found = yaml.load(f"[{value}]", _Loader)
    except yaml.YAMLError:
        return key, value
    return key, found


def _is_text(key: str) -> bool:
    return str in (_TYPES.get(key), *typing.get_args(_TYPES.get(key)))


def _merge(values: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, str]:
    """Lays ``layer`` over ``values``; returns the keys without meaning."""
    ignored: dict[str, str] = {}
    for keys in _ALTERNATIVES:
        named = [k for k in keys if layer.get(k) is not None]
        if named:
            for key in keys:
                values.pop(key, None)
    if layer.get("train.steps") is not None and layer.get("train.epochs") is not None:
        raise RecipeError("train.steps and train.epochs contradict each other: give one of them")
    for key, value in layer.items():
        section = key.split(".")[0]
        if key in WITHOUT_MEANING or section in WITHOUT_MEANING:
            ignored[key] = WITHOUT_MEANING.get(key) or WITHOUT_MEANING[section]
        elif key == "student.pretrained_weights":
            if value:
                raise RecipeError("student.pretrained_weights: give init.weights=FILE instead")
            ignored[key] = "empty"
        elif key in _TYPES:
            values[key] = _convert(key, value, _TYPES[key])
        elif key in _SECTIONS:
            raise RecipeError(f"{key} is a section: give its keys, such as {key}.{next(iter(_keys_of(key)))}=value")
        else:
            raise RecipeError(f"unknown key {key!r}{_nearest(key, [*_TYPES, *_SECTIONS])}")
    return ignored


def _keys_of(section: str) -> list[str]:
    return [f.name for f in dataclasses.fields(_SECTIONS[section])]


def nearest_keys(word: str) -> list[str]:
    """Up to three keys of recipes that a word is near to."""
    return _near(word, list(_TYPES))


def _nearest(word: str, words: list[str]) -> str:
    near = _near(word, words)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _near(word: str, words: list[str]) -> list[str]:
    last = word.split(".")[-1]
    same_ending = [w for w in words if w.split(".")[-1] == last]
    endings = {w.split(".")[-1]: w for w in reversed(words)}
    near = same_ending or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    near = near or [endings[e] for e in difflib.get_close_matches(last, list(endings), n=1, cutoff=0.6)]
    return near[:3]


def _build(values: Mapping[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    top: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            sections[section][name] = value
        else:
            top[key] = value
    return Recipe(**top, **{name: cls(**sections[name]) for name, cls in _SECTIONS.items()})


def _convert(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the type of ``key``, or an error that says what was expected."""
    if isinstance(value, str) and not value.strip():
        raise RecipeError(f"{key} has no value: give one, or write null where there is to be none")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(key, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{key}: expected {' | '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if variadic and not isinstance(value, list | tuple):
            value = [value]
        if not isinstance(value, list | tuple) or (not variadic and len(value) != len(arguments)) or not value:
            count = "numbers" if variadic else f"{len(arguments)} numbers"
            raise RecipeError(f"{key}: expected a list of {count}, got {value!r}")
        return tuple(_convert(key, v, arguments[0]) for v in value)
    if hint is float:
        # YAML 1.1 reads 1e-3 (no point) as text.
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or number != number or abs(number) == float("inf"):
            raise RecipeError(f"{key}: expected a number, got {value!r}")
        return number
    if hint is int and isinstance(value, float | str) and not isinstance(value, bool):
        try:
            value = int(float(value)) if float(value).is_integer() else value
        except ValueError:
            pass  # told below, with the value as given
    if hint is bool and isinstance(value, str):
        value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    if type(value) is not hint:
        expected = {int: "a whole number", bool: "true or false", str: "text"}[hint]
        raise RecipeError(f"{key}: expected {expected}, got {value!r}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _validate(recipe: Recipe) -> None:
    """Contradictions that show without the data; ``build`` finds those that need it."""
    flat = flatten(recipe)
    for key in ("dino", "ibot"):
        for size in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
            _require(flat[f"{key}.{size}"] >= 1, f"{key}.{size}: expected at least 1, got {flat[f'{key}.{size}']}")
        _require(flat[f"{key}.student_temp"] > 0, f"{key}.student_temp: expected more than 0")
    at_least_one = (
        "train.batch_size_per_gpu train.OFFICIAL_EPOCH_LENGTH train.steps train.sinkhorn_iterations train.threads "
        "train.max_skips student.patch_size student.in_chans student.embed_dim student.depth student.num_heads "
        "crops.global_crops_size crops.local_crops_size eval.size checkpoint.every_steps checkpoint.keep_last "
        "checkpoint.keep_every log.every_steps probe.every_steps probe.max_images probe.patience "
        "ibot.mask_min_patches data.max_pixels train.accumulate train.batch_size parallel.shard_ranks"
    )
    for key in at_least_one.split():
        _require(flat[key] is None or flat[key] >= 1, f"{key}: expected at least 1, got {flat[key]}")
    for key, value in flat.items():
        not_negative = key.endswith(("_weight", "_epochs", "_probability", "weight_decay", "_lr", "_flip"))
        if not_negative and isinstance(value, float):
            _require(value >= 0, f"{key}: expected 0 or more, got {value:g}")
    _validate_values(recipe.data)
    for key in (
        "optim.weight_decay_end optim.clip_grad optim.patch_embed_lr_mult student.layerscale "
        "student.interpolate_offset student.num_register_tokens augment.brightness augment.contrast augment.saturation "
        "augment.hue crops.local_crops_number train.num_workers train.seed train.max_rollbacks"
    ).split():
        _require(flat[key] is None or flat[key] >= 0, f"{key}: expected 0 or more, got {flat[key]}")
    for key in ("optim.layerwise_decay", "optim.base_lr", "teacher.teacher_temp", "teacher.warmup_teacher_temp"):
        _require(flat[key] > 0, f"{key}: expected more than 0, got {flat[key]:g}")
    for key in (
        "train.epochs",
        "train.max_minutes",
        "checkpoint.every_minutes",
        "report.every_minutes",
        "probe.every_minutes",
        "parallel.timeout_minutes",
        "student.mlp_ratio",
        "optim.epochs",
        "data.timeout",
    ):
        _require(flat[key] is None or flat[key] > 0, f"{key}: expected more than 0, got {flat[key]}")
    for key in (
        "ibot.mask_sample_probability augment.horizontal_flip augment.vertical_flip augment.quarter_turns "
        "augment.jitter_probability augment.grayscale_probability augment.solarize_probability data.max_bad_share "
        "teacher.momentum_teacher teacher.final_momentum_teacher dino.center_momentum ibot.center_momentum"
    ).split():
        _require(0 <= flat[key] <= 1, f"{key}: expected 0 to 1, got {flat[key]:g}")
    for key in ("student.drop_path_rate student.interpolate_offset optim.adamw_beta1 optim.adamw_beta2").split():
        _require(0 <= flat[key] < 1, f"{key}: expected 0 up to below 1, got {flat[key]:g}")
    _require(recipe.augment.hue <= 0.5, f"augment.hue: expected 0 to 0.5, got {recipe.augment.hue:g}")
    for key in ("crops.global_crops_scale", "crops.local_crops_scale"):
        low, high = flat[key]
        _require(0 < low <= high <= 1, f"{key}: expected 0 < low ≤ high ≤ 1 (shares of the image), got {[low, high]}")
    low, high_ratio = recipe.ibot.mask_ratio_min_max
    _require(
        0 <= low <= high_ratio <= 1, f"ibot.mask_ratio_min_max: expected 0 ≤ low ≤ high ≤ 1, got {[low, high_ratio]}"
    )
    _require(0 < recipe.ibot.mask_min_aspect <= 1, "ibot.mask_min_aspect: expected above 0 up to 1")
    for key in ("crops.aspect_ratio", "augment.blur_sigma"):
        low, high = flat[key]
        _require(0 < low <= high, f"{key}: expected 0 < low ≤ high, got {[low, high]}")
    _require(
        recipe.augment.blur_kernel % 2 == 1 and recipe.augment.blur_kernel > 0,
        f"augment.blur_kernel: expected an odd number of pixels, got {recipe.augment.blur_kernel}",
    )
    for share in recipe.augment.blur_probability or ():
        _require(0 <= share <= 1, f"augment.blur_probability: expected values from 0 to 1, got {share:g}")
    for key in flat:
        if key.endswith("_length") and flat[key] is not None:
            parse_length(flat[key])
    _require(recipe.init.enlarge > 0, f"init.enlarge: expected more than 0, got {recipe.init.enlarge:g}")
    momentum = recipe.teacher.frozen_momentum_teacher
    _require(momentum is None or 0 <= momentum <= 1, "teacher.frozen_momentum_teacher: expected 0 to 1")
    dino = recipe.dino.loss_weight * (recipe.dino.global_loss_weight + recipe.dino.local_loss_weight)
    _require(
        dino + recipe.ibot.loss_weight + recipe.dino.koleo_loss_weight > 0,
        "every loss is off: dino.loss_weight (times its two parts), ibot.loss_weight and dino.koleo_loss_weight are 0",
    )
    _require(
        dino + recipe.dino.koleo_loss_weight > 0 or recipe.ibot.mask_sample_probability * high_ratio > 0,
        "only the iBOT loss is on, but ibot.mask_sample_probability or ibot.mask_ratio_min_max masks nothing",
    )
    frozen = recipe.optim.freeze_backbone_length
    _require(
        dino + recipe.ibot.loss_weight > 0 or frozen is None or parse_length(frozen).amount == 0,
        f"optim.freeze_backbone_length={frozen}: there is no head that could learn meanwhile, because dino.loss_weight "
        "and ibot.loss_weight are 0",
    )
    _require(
        recipe.train.steps is None or recipe.train.epochs is None,
        "train.steps and train.epochs contradict each other: give one of them",
    )
    group, scope = recipe.dino.koleo_group_size, recipe.dino.koleo_scope
    _require(
        (scope == "groups") == (group is not None) and (group is None or group >= 2),
        f"dino.koleo_scope=groups goes with dino.koleo_group_size of at least 2, got {scope} and {group}",
    )
    _require(
        recipe.parallel.shard_ranks is None or recipe.parallel.mode == "hsdp",
        "parallel.shard_ranks is for parallel.mode=hsdp",
    )
    sharded = recipe.parallel.mode in ("fsdp", "hsdp")
    _require(not (sharded and recipe.precision == "fp16"), "precision=fp16 cannot be sharded: set precision=bf16")
    _require(recipe.train.seed < 2**63, "train.seed: expected less than 2^63")


def _validate_values(data: Data) -> None:
    """How values become pixels."""
    if data.range is not None:
        pairs = list(zip(data.range[::2], data.range[1::2], strict=False))
        fits = len(data.range) % 2 == 0 and all(float("-inf") < a < b < float("inf") for a, b in pairs)
        _require(
            fits and bool(pairs),
            f"data.range: expected low, high with low < high, or such a pair for each channel, got {list(data.range)}",
        )
    _require(0 <= data.fill <= 255, f"data.fill: expected a level from 0 to 255, got {data.fill}")
    plane = data.plane
    _require(
        plane is None or plane in ("max", "each") or plane.isdecimal(),
        f"data.plane: expected a number from 0, max or each, got {plane!r}",
    )


def _validate_sizes(recipe: Recipe) -> None:
    """Contradictions of crops and pixel values with the network."""
    flat = flatten(recipe)
    patch = recipe.student.patch_size
    sizes = {"crops.global_crops_size": recipe.crops.global_crops_size}
    if recipe.crops.local_crops_number:
        sizes["crops.local_crops_size"] = recipe.crops.local_crops_size
    if recipe.eval.size is not None:
        sizes["eval.size"] = recipe.eval.size
    for key, side in sizes.items():
        _require(
            key == "eval.size" or recipe.augment.blur_kernel // 2 < side,
            f"augment.blur_kernel={recipe.augment.blur_kernel} is too large for {key}={side}",
        )
        near = max(patch, round(side / patch) * patch)
        _require(
            side % patch == 0,
            f"{key}={side} is not a multiple of student.patch_size={patch}: the nearest that is, is {near}",
        )
    for key in ("data.mean", "data.std"):
        count, channels = len(flat[key]), recipe.student.in_chans
        _require(
            count in (1, channels),
            f"{key} has {count} values for student.in_chans={channels}: give one, or one for each channel",
        )
    _require(all(s > 0 for s in recipe.data.std), f"data.std: expected values above 0, got {list(recipe.data.std)}")
    pairs = len(recipe.data.range or ()) // 2
    _require(
        pairs in (0, 1, recipe.student.in_chans),
        f"data.range has {pairs} pairs for student.in_chans={recipe.student.in_chans}: give one, or one for each "
        "channel",
    )
    if recipe.report.channels is not None:
        require_shown_channels(recipe.report.channels, recipe.student.in_chans, "report.channels")


def require_shown_channels(shown: Sequence[int], count: int, name: str) -> None:
    """Check which channels pictures show.

    Args:
        shown: One as grey, or three as red, green and blue.
        count: Channels that images have.
        name: What to call them in the error.

    Raises:
        RecipeError: Another number of channels, or one that images do not have.
    """
    _require(
        len(shown) in (1, 3) and all(0 <= channel < count for channel in shown),
        f"{name}: expected one channel, or three for red, green and blue, each from 0 to {count - 1}, "
        f"got {list(shown)}",
    )
