"""What values of a recipe contradict each other, or cannot be."""

from collections.abc import Sequence

from dinoforge.errors import RecipeError
from dinoforge.recipe.schema import Data, Recipe, flatten, parse_length


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def validate(recipe: Recipe) -> None:
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


def validate_sizes(recipe: Recipe) -> None:
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
