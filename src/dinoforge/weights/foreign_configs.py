"""Configurations that other libraries write beside weights, held against the weights and against our network.

Tensors say nothing about activations, epsilons, heads, or how images were made. The network of this package has one
of each, so weights that were trained with another would load and give other outputs. What differs is refused; what
cannot change outputs is passed over; the rest is told in notes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.weights.architecture import listed

NORM_EPS = 1e-6  # of every LayerNorm in VisionTransformer
_EXACT_GELU = ("gelu", "gelu_python")  # names of transformers for the activation of VisionTransformer's MLP
_MODEL_TYPES = ("dinov2", "dinov2_with_registers")

# Of transformers: changes training there, not outputs.
_TRAINING_ONLY = {
    "hidden_dropout_prob": "there is no such dropout here",
    "attention_probs_dropout_prob": "there is no such dropout here",
    "drop_path_rate": "here student.drop_path_rate says it",
}
_REFUSED_IF_SET = ("quantization_config", "pruned_heads", "is_decoder", "add_cross_attention")
_NO_EFFECT = frozenset(
    """_attn_implementation _commit_hash _name_or_path architectures attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences out_features out_indices output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty reshape_hidden_states
    return_dict return_dict_in_generate sep_token_id stage_names suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache use_mask_token use_return_dict""".split()
)
_HELD = frozenset(
    """hidden_size num_hidden_layers num_attention_heads patch_size num_channels num_register_tokens image_size
    mlp_ratio qkv_bias use_swiglu_ffn hidden_act layer_norm_eps head_dim layerscale_value apply_layernorm
    auto_map""".split()
)

# Of timm: its plain vision transformers, whose activation is the exact GELU and whose epsilon is 1e-6.
_TIMM = re.compile(r"(?:vit_\w+?_patch\d+(?:_reg\d+)?_dinov2|vit_(?:tiny|small|base|large)_patch\d+_\d+)")
_TIMM_HELD = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "qkv_bias": "qkv_bias",
    "reg_tokens": "num_register_tokens",
}
_TIMM_NO_EFFECT = frozenset(
    """num_classes global_pool dynamic_img_size dynamic_img_pad drop_rate pos_drop_rate patch_drop_rate proj_drop_rate
    attn_drop_rate drop_path_rate weight_init fix_init init_values mlp_ratio class_token no_embed_class""".split()
)

_PREPROCESSOR_HELD = frozenset(
    """image_mean image_std do_normalize do_rescale rescale_factor resample do_resize size do_center_crop crop_size
    do_pad do_flip_channel_order offset rescale_offset""".split()
)
_PREPROCESSOR_NO_EFFECT = frozenset(
    """_processor_class _valid_processor_keys auto_map crop_pct data_format default_to_square device disable_grouping
    do_convert_rgb feature_extractor_type image_processor_type image_seq_length input_data_format pad_size
    processor_class return_tensors size_divisor use_fast""".split()
)
_RESAMPLING = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}  # Pillow's numbers
_BICUBIC = 3


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of timm's."""
    return "model_type" not in config and isinstance(config.get("architecture"), str)


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``VisionTransformer`` that a ``config.json`` says and tensors cannot: the number of heads.

    Args:
        config: of transformers or timm.

    Raises:
        WeightsError: of another kind of model, or without what is needed.
    """
    if is_timm(config):
        name = config["architecture"]
        if not _TIMM.fullmatch(name):
            raise WeightsError(
                f"it says architecture={name!r}: expected one of timm's DINOv2 or plain vision transformers, such as "
                "'vit_small_patch14_dinov2'. Others may have another activation or epsilon, which this network has not"
            )
        heads = _model_args(config).get("num_heads")
        return {} if heads is None else {"num_heads": _whole_number("num_heads", heads)}
    kind = config.get("model_type")
    if kind not in (None, *_MODEL_TYPES) or (kind is None and "num_attention_heads" not in config):
        said = f"it says model_type={kind!r}" if kind is not None else f"it says no model_type, but {_keys(config)}"
        raise WeightsError(
            f"{said}: no configuration of a Dinov2 model, expected {' or '.join(map(repr, _MODEL_TYPES))}"
        )
    if "num_attention_heads" not in config:
        raise WeightsError(
            f"it says no num_attention_heads, which tensors cannot say: no configuration of a Dinov2 model, as far as "
            f"it goes. It has {_keys(config)}; write num_attention_heads into it"
        )
    return {"num_heads": _whole_number("num_attention_heads", config["num_attention_heads"])}


def hold(config: Mapping[str, Any], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Holds what a ``config.json`` says against the weights beside it and against what our network can do.

    Args:
        config: of transformers or timm; ``arguments_of`` took it.
        architecture: arguments of ``VisionTransformer`` that the tensors imply.
        tensors: with official names.

    Returns:
        What may differ from the other library and is not refused, in words.

    Raises:
        WeightsError: outputs would not be those of the model that the configuration describes.
    """
    return _hold_timm(config, architecture) if is_timm(config) else _hold_hugging_face(config, architecture, tensors)


def _hold_hugging_face(
    config: Mapping[str, Any], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str]:
    a = architecture
    swiglu, registers, patch = a["ffn_layer"] != "mlp", a["num_register_tokens"], a["patch_size"]
    wrong = _unequal(
        config,
        {
            "hidden_size": a["embed_dim"],
            "num_hidden_layers": a["depth"],
            "num_attention_heads": a["num_heads"],
            "patch_size": patch,
            "num_channels": a["in_chans"],
            "qkv_bias": a["qkv_bias"],
            "use_swiglu_ffn": swiglu,
            **({"num_register_tokens": registers} if config.get("model_type") != "dinov2" else {}),
        },
    )
    if config.get("model_type") == "dinov2" and registers:
        wrong.append(f"model_type='dinov2', which has no register tokens, but the weights have {registers}")
    if config.get("model_type") == "dinov2_with_registers" and not registers:
        wrong.append("model_type='dinov2_with_registers', but the weights have no register tokens")
    wrong += _wrong_grid(config, "image_size", a)
    hidden = tensors[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1]
    if "mlp_ratio" in config and hidden != _hidden_width(a["embed_dim"], config["mlp_ratio"], swiglu):
        wrong.append(f"mlp_ratio={config['mlp_ratio']!r}, but the weights have hidden layers of {hidden} channels")
    if wrong:
        raise WeightsError(f"it says {'; '.join(wrong)}. {_TAKE_BOTH}")

    cannot = []
    if not swiglu and (act := config.get("hidden_act", "gelu")) not in _EXACT_GELU:
        cannot.append(f"hidden_act={act!r}, but this network has the exact GELU, 'gelu'")
    if (eps := config.get("layer_norm_eps", NORM_EPS)) != NORM_EPS:
        cannot.append(f"layer_norm_eps={eps!r}, but this network has {NORM_EPS:g}")
    if "head_dim" in config and config["head_dim"] != a["embed_dim"] // a["num_heads"]:
        cannot.append(f"head_dim={config['head_dim']!r}, but this network has hidden_size / num_attention_heads")
    scale = config.get("layerscale_value", 1.0)
    if not a["layerscale"] and scale != 1:
        cannot.append(f"layerscale_value={scale!r}, but the weights have no LayerScale")
    cannot += [f"{key}={_short(config[key])}, which this network has not" for key in _REFUSED_IF_SET if config.get(key)]
    if cannot:
        raise WeightsError(f"it says {'; '.join(cannot)}. {_OTHER_OUTPUTS}")

    notes = [
        f"config.json says {key}={config[key]}, which changes training and no outputs: {instead}"
        for key, instead in _TRAINING_ONLY.items()
        if config.get(key)
    ]
    if not a["layerscale"]:
        notes.append("no LayerScale in the weights, which is the same as one of 1")
    if config.get("apply_layernorm") is False:
        notes.append(
            "config.json says apply_layernorm=false, of feature maps: here get_intermediate_layers(norm=False)"
        )
    if config.get("auto_map"):
        notes.append("config.json names code of its own in auto_map, which is not run: it may compute something else")
    size = config.get("image_size")
    if isinstance(size, int) and size != a["image_size"]:
        notes.append(f"config.json says image_size={size}, of which patches of {patch} cover {a['image_size']} pixels")
    return notes + _unknown("config.json", config, _HELD | _NO_EFFECT | set(_TRAINING_ONLY) | set(_REFUSED_IF_SET))


def _hold_timm(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> list[str]:
    said = _model_args(config)
    plain = {key: value for key, value in said.items() if key != "img_size"}
    wrong = _unequal(plain, {theirs: architecture[ours] for theirs, ours in _TIMM_HELD.items() if theirs in plain})
    wrong += _wrong_grid(said, "img_size", architecture)
    if patch := re.search(r"_patch(\d+)", config["architecture"]):
        stated = said.get("patch_size", int(patch[1]))
        if _side(stated) != architecture["patch_size"]:
            wrong.append(f"patches of {stated} pixels, but the weights have {architecture['patch_size']}")
    if wrong:
        raise WeightsError(f"it says {'; '.join(dict.fromkeys(wrong))}. {_TAKE_BOTH}")
    others = {key: value for key, value in said.items() if key not in {*_TIMM_HELD, *_TIMM_NO_EFFECT}}
    if cannot := [f"{key}={_short(value)}" for key, value in others.items() if value]:
        raise WeightsError(f"its model_args say {', '.join(cannot)}, which is not known here. {_OTHER_OUTPUTS}")
    return []


def image_rule(config: Mapping[str, Any], size: int) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Mean and standard deviation on the range 0..1 that a ``preprocessor_config.json`` amounts to, and notes.

    There, pixels 0..255 become ``(pixel * rescale_factor - image_mean) / image_std``; either part may be off.

    Args:
        config: of an image processor of transformers.
        size: side in pixels that ``Backbone.preprocess`` resizes images to.

    Returns:
        ``mean`` and ``std``, and in words what is done otherwise than there.

    Raises:
        WeightsError: it does not say them, or says what cannot be done here.
    """
    if bad := [key for key in ("do_flip_channel_order", "offset", "rescale_offset") if config.get(key)]:
        raise WeightsError(
            f"it says {', '.join(f'{key}={config[key]}' for key in bad)}, which is not done here: features would be "
            "others. Give mean and std, and remove the file, if your images are made that way already"
        )
    notes: list[str] = []
    if config.get("do_normalize", True):
        values = {key: _numbers(config, f"image_{key}") for key in ("mean", "std")}
    else:
        values = {"mean": (0.0,), "std": (1.0,)}
        notes.append("preprocessor_config.json says do_normalize=false: mean 0 and std 1 are taken")
    if not all(0 < value < math.inf for value in values["std"]) or not all(map(math.isfinite, values["mean"])):
        raise WeightsError(f"it says image_mean={values['mean']}, image_std={values['std']}: expected std above 0")
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise WeightsError(f"it says rescale_factor={factor!r}: expected a number above 0, usually 1/255")
    if not math.isclose(scale := 255 * factor, 1, rel_tol=1e-6):
        values = {key: tuple(value / scale for value in each) for key, each in values.items()}
        said = f"rescale_factor={factor:g}" if config.get("do_rescale", True) else "do_rescale=false"
        notes.append(
            f"preprocessor_config.json says {said}, not 1/255: mean and std are taken over {scale:g}, which is the same"
        )
    resample = config.get("resample", _BICUBIC)
    if config.get("do_resize", True) and resample != _BICUBIC:
        name = _RESAMPLING.get(resample, "unknown") if isinstance(resample, int) else "unknown"
        notes.append(f"preprocessor_config.json says resample={resample} ({name}): here images are resized bicubically")
    notes += _other_size(config, size)
    return values, notes + _unknown("preprocessor_config.json", config, _PREPROCESSOR_HELD | _PREPROCESSOR_NO_EFFECT)


def timm_image_rule(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation that timm's ``config.json`` says, if it does."""
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, Mapping):
        return {}
    values = {key: _numbers(cfg, key) for key in ("mean", "std") if key in cfg}
    if not all(0 < value < math.inf for value in values.get("std", ())):
        raise WeightsError(f"it says std={values['std']}: expected numbers above 0")
    return values


_TAKE_BOTH = (
    "Configuration and weights are not of one model, or part of the weights is missing: take both from one source "
    "again, or correct the configuration if you are sure of the weights"
)
_OTHER_OUTPUTS = (
    "Outputs would not be those of that model, so its weights are not loaded: take a model without this, or correct "
    "the configuration if it is wrong"
)


def _unequal(config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys of a configuration that say something else than the weights, in words."""
    wrong = []
    for key, value in expected.items():
        if key not in config:
            continue
        said = _side(config[key])
        if isinstance(said, bool) != isinstance(value, bool) or said != value:
            wrong.append(f"{key}={_short(config[key])}, but the weights have {value}")
    return wrong


def _wrong_grid(config: Mapping[str, Any], key: str, architecture: Mapping[str, Any]) -> list[str]:
    """Images of that size do not have as many patches as there are position embeddings."""
    if key not in config:
        return []
    side, patch = _side(config[key]), architecture["patch_size"]
    grid = architecture["image_size"] // patch
    if isinstance(side, int) and not isinstance(side, bool) and side // patch == grid:
        return []
    return [f"{key}={_short(config[key])}, but the weights have position embeddings for {grid} × {grid} patches"]


def _side(value: Any) -> Any:
    """The side of a square that is given as one number or as two equal ones."""
    if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


def _hidden_width(dim: int, ratio: Any, swiglu: bool) -> int | None:
    """Of the feed-forward layers of transformers' Dinov2."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not math.isfinite(ratio):
        return None
    hidden = int(dim * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _other_size(config: Mapping[str, Any], size: int) -> list[str]:
    """What sizes images there have, if they are not made as here: the whole image, ``size`` × ``size``."""
    resized, cropped = config.get("do_resize", True), config.get("do_center_crop", False)
    sides = config.get("size")
    whole = isinstance(sides, Mapping) and (sides.get("height"), sides.get("width")) == (size, size)
    if resized and not cropped and (sides is None or sides == size or whole):
        return []
    ways = [
        *([f"size={_short(sides)}"] if resized else ["do_resize=false"]),
        *([f"a centre crop of {_short(config.get('crop_size'))}"] if cropped else []),
        *(["do_pad=true"] if config.get("do_pad") else []),
    ]
    return [
        f"preprocessor_config.json makes images by {', '.join(ways)}; here the whole image becomes {size} × {size} "
        "pixels, unless preprocess is given size and center_crop"
    ]


def _unknown(name: str, config: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    keys = [key for key, value in config.items() if key not in known and value is not None]
    if not keys:
        return []
    return [f"{name} also says {listed(keys)}, which is not known here: it may change what the model computes"]


def _model_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    said = config.get("model_args") or {}
    if not isinstance(said, Mapping):
        raise WeightsError(f"its model_args are no object, but {_short(said)}")
    return said


def _whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WeightsError(f"it says {key}={_short(value)}: expected a whole number of at least 1")
    return value


def _numbers(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """One number, or one for each channel."""
    value = config.get(key)
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise WeightsError(f"it does not say {key}: expected numbers, got {_short(value)}; it has {_keys(config)}")
    return tuple(map(float, values))


def _keys(config: Mapping[str, Any]) -> str:
    return f"the keys {listed(list(map(str, config)))}" if config else "no keys"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
