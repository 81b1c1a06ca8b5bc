"""The official layout, and the way to it from checkpoints, wrappers and other libraries' names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.weights.hugging_face import from_hugging_face
from dinoforge.weights.timm import from_timm
from dinoforge.weights.words import described, listed

# Wrappers that training engines leave in names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
# Keys of checkpoints under which the weights' moving average lies, and keys of weights that are or may be raw.
_AVERAGED = (
    "teacher",
    "ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema_model",
    "teacher_state_dict",
    "target_encoder",
    "shadow",
)
_OTHER = ("student_teacher", "model", "state_dict", "model_state_dict", "module", "student")
# Prefixes of the same within one state dict; "network." is that of dinoforge.load's module.
_AVERAGED_PREFIXES = ("teacher.", "teacher_backbone.", "ema_model.", "model_ema.", "ema.", "target_encoder.")
_OTHER_PREFIXES = ("student.", "student_backbone.", "model.", "backbone.", "network.")
_NESTED = 5  # levels of keys or prefixes
# Parts of a checkpoint that are no backbone.
_HEADS = re.compile(
    r"(?:dino_head|ibot_head|head|classifier|dino_loss|ibot_patch_loss|dino_center|ibot_center)(?:\.|$)"
)


def official_names(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Find a backbone's tensors in a checkpoint and rename them to official names.

    It knows official backbones and training checkpoints (chunked blocks, FSDP's prefixes), timm's and Hugging Face's
    files. It takes the weights' moving average (teacher, EMA) from a checkpoint that also has the raw weights.

    Args:
        state: The content of a file.

    Returns:
        The tensors, and notes on what was done to them.

    Raises:
        WeightsError: There are no tensors, two entries for one parameter, or tensors that are not of floating-point
            numbers.
    """
    notes: list[str] = []
    state = _state_dict(state, notes)
    named = {_WRAPPERS.sub("", name): t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if named.pop("n_averaged", None) is not None:
        notes.append("an average of the weights, as PyTorch's AveragedModel keeps it")
    named = _below_prefixes(named, notes)
    if any("patch_embeddings." in name for name in named):
        named = from_hugging_face(named)
        notes.append("Hugging Face's layout")
        if "register_tokens" not in named:
            notes.append(
                "transformers resamples position embeddings of other sizes by another rule, interpolate_offset=0.0"
            )
    if heads := [name for name in named if _HEADS.match(name)]:
        named = {name: t for name, t in named.items() if name not in heads}
        notes.append(f"left out, of heads: {listed(heads)}")
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        official = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        if official in result:
            raise WeightsError(f"two entries for {official}: the blocks are numbered twice")
        result[official] = tensor
    if not result:
        raise WeightsError(f"no tensors in it: expected the weights of a vision transformer, got {described(state)}")
    if wrong := [name for name, tensor in result.items() if not tensor.is_floating_point()]:
        kinds = sorted({str(result[name].dtype).removeprefix("torch.") for name in wrong})
        raise WeightsError(
            f"tensors of {', '.join(kinds)}: {listed(wrong)}. Expected floating-point numbers; these are of "
            "another network, or quantised, and then the library that did it can put them back"
        )
    return from_timm(result, notes), notes


def _state_dict(state: Mapping[Any, Any], notes: list[str]) -> Mapping[Any, Any]:
    """Find the state dict in a checkpoint: that of the moving average if there is one."""
    for _ in range(_NESTED):
        there = [key for key, value in state.items() if isinstance(value, Mapping) and _has_tensors(value)]
        key = next((key for key in (*_AVERAGED, *_OTHER) if key in there), None)
        if key is None:
            break
        averaged = ", the moving average" if key in _AVERAGED else ""
        others = [str(other) for other in state if other != key]
        beside = f"; left out beside it: {listed(others)}" if others else ""
        raw = [f"{other!r} ({type(state[other]).__name__})" for other in _AVERAGED if other in state]
        if key == "student":
            beside += ". These are the raw weights: there is no teacher in it"
        elif not averaged and raw:
            beside += f". {', '.join(raw)} holds no tensors by name, so these may be the raw weights"
        notes.append(f"taken from the key {key!r}{averaged}{beside}")
        state = state[key]
    return state


def _below_prefixes(named: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Choose one network's tensors by their prefix: those of the moving average if there is one."""
    for _ in range(_NESTED):
        prefixes = (*_AVERAGED_PREFIXES, *_OTHER_PREFIXES)
        prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in named)), None)
        if prefix is None:
            break
        rest = [name for name in named if not name.startswith(prefix)]
        named = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
        averaged = ", the moving average" if prefix in _AVERAGED_PREFIXES else ""
        if prefix.startswith("student"):
            notes.append(f"taken from below {prefix!r}, the raw weights: there is no teacher in it")
        if rest:
            notes.append(f"left out, not below {prefix!r}{averaged}: {listed(rest)}")
    return named


def _has_tensors(value: Mapping[Any, Any], depth: int = 3) -> bool:
    """Whether a nested mapping holds any tensor; the depth is limited since a file may nest without end."""
    return any(
        isinstance(each, Tensor) or (depth > 0 and isinstance(each, Mapping) and _has_tensors(each, depth - 1))
        for each in value.values()
    )
