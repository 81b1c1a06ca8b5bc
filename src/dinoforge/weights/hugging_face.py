"""Hugging Face's layout, in both directions: names of tensors, ``config.json`` and ``preprocessor_config.json``."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoforge.data.image_input import ImageInput
from dinoforge.errors import ExportError, WeightsError
from dinoforge.weights.configs import (
    OTHER_OUTPUTS,
    TAKE_BOTH,
    contradictions,
    keys_in_words,
    numbers,
    whole_number,
    wrong_grid,
)
from dinoforge.weights.words import listed, short

# Names of tensors

_TO_OFFICIAL = (
    (r"^(?:dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.qkv.0."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.qkv.1."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.qkv.2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w12.0."),
    (r"\.mlp\.up_proj\.", ".mlp.w12.1."),
)

_FROM_OFFICIAL = (
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)


def from_hugging_face(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face's tensors to official names, with query, key and value in one tensor."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in named.items():
        for pattern, replacement in _TO_OFFICIAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    whole: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        part = re.fullmatch(r"(.*\.(?:qkv|w12))\.(\d)\.(weight|bias)", name)
        if part is None:
            whole[name] = tensor
            continue
        count = 3 if part[1].endswith("qkv") else 2
        pieces = [renamed.get(f"{part[1]}.{i}.{part[3]}") for i in range(count)]
        present = [piece for piece in pieces if piece is not None]
        if len(present) == count:
            whole[f"{part[1]}.{part[3]}"] = torch.cat(present)
        else:
            whole[name] = tensor  # reported as unexpected
    return whole


def to_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename official tensors to the names that every version of transformers reads."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("norm."):
            result[f"layer{name}"] = tensor
            continue
        for official, theirs in _FROM_OFFICIAL:
            name = name.replace(official, theirs)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.contiguous()
        else:
            result[name] = tensor
    return result


# What config.json says of the network

NORM_EPS = 1e-6  # the epsilon of every LayerNorm in VisionTransformer
_EXACT_GELU = ("gelu", "gelu_python")  # transformers' names of the activation in VisionTransformer's MLP
_MODEL_TYPES = ("dinov2", "dinov2_with_registers")

# Keys that change training in transformers but no outputs, and what this package has instead.
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


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read from a ``config.json`` the arguments of ``VisionTransformer`` that tensors cannot say: the number of heads.

    Args:
        config: The content of transformers' ``config.json``.

    Raises:
        WeightsError: The configuration is of another kind of model, or lacks the number of heads.
    """
    kind = config.get("model_type")
    if kind not in (None, *_MODEL_TYPES) or (kind is None and "num_attention_heads" not in config):
        said = (
            f"it says model_type={kind!r}"
            if kind is not None
            else f"it says no model_type, but {keys_in_words(config)}"
        )
        raise WeightsError(
            f"{said}: no configuration of a Dinov2 model, expected {' or '.join(map(repr, _MODEL_TYPES))}"
        )
    if "num_attention_heads" not in config:
        raise WeightsError(
            f"it says no num_attention_heads, which tensors cannot say: no configuration of a Dinov2 model, as far as "
            f"it goes. It has {keys_in_words(config)}; write num_attention_heads into it"
        )
    return {"num_heads": whole_number("num_attention_heads", config["num_attention_heads"])}


def hold(config: Mapping[str, Any], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Hold a ``config.json`` of transformers against the weights beside it and against our network.

    Args:
        config: A configuration that ``arguments_of`` has accepted.
        architecture: The arguments of ``VisionTransformer`` that the tensors imply.
        tensors: The weights under official names.

    Returns:
        Notes on what may differ from transformers without being refused.

    Raises:
        WeightsError: Outputs would not be those of the model that the configuration describes.
    """
    if wrong := _contradicted(config, architecture, tensors):
        raise WeightsError(f"it says {'; '.join(wrong)}. {TAKE_BOTH}")
    if cannot := _not_ours(config, architecture):
        raise WeightsError(f"it says {'; '.join(cannot)}. {OTHER_OUTPUTS}")
    return _notes(config, architecture)


def _contradicted(
    config: Mapping[str, Any], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Name the keys of a configuration that contradict the weights."""
    a = architecture
    swiglu, registers, patch = a["ffn_layer"] != "mlp", a["num_register_tokens"], a["patch_size"]
    wrong = contradictions(
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
    wrong += wrong_grid(config, "image_size", a)
    hidden = _hidden(tensors, swiglu)
    if "mlp_ratio" in config and not _is_width(hidden, a["embed_dim"], config["mlp_ratio"], swiglu):
        wrong.append(f"mlp_ratio={config['mlp_ratio']!r}, but the weights have hidden layers of {hidden} channels")
    return wrong


def _not_ours(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> list[str]:
    """Name the keys of a configuration that ask for something that our network does not have."""
    a, cannot = architecture, []
    if a["ffn_layer"] == "mlp" and (act := config.get("hidden_act", "gelu")) not in _EXACT_GELU:
        cannot.append(f"hidden_act={act!r}, but this network has the exact GELU, 'gelu'")
    if (eps := config.get("layer_norm_eps", NORM_EPS)) != NORM_EPS:
        cannot.append(f"layer_norm_eps={eps!r}, but this network has {NORM_EPS:g}")
    if "head_dim" in config and config["head_dim"] != a["embed_dim"] // a["num_heads"]:
        cannot.append(f"head_dim={config['head_dim']!r}, but this network has hidden_size / num_attention_heads")
    scale = config.get("layerscale_value", 1.0)
    if not a["layerscale"] and scale != 1:
        cannot.append(f"layerscale_value={scale!r}, but the weights have no LayerScale")
    cannot += [f"{key}={short(config[key])}, which this network has not" for key in _REFUSED_IF_SET if config.get(key)]
    return cannot


def _notes(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> list[str]:
    """Write notes on keys that may make a difference to transformers without being refused."""
    a = architecture
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
        notes.append(
            f"config.json says image_size={size}, of which patches of {a['patch_size']} cover {a['image_size']} pixels"
        )
    return notes + _unknown_keys("config.json", config, _HELD | _NO_EFFECT | set(_TRAINING_ONLY) | set(_REFUSED_IF_SET))


def config_of(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
    """Describe a backbone by the arguments of transformers' ``Dinov2Config`` or ``Dinov2WithRegistersConfig``.

    Args:
        architecture: The arguments of its ``VisionTransformer``.
        tensors: The weights under official names.
        image_size: The side in pixels of the images that its position embeddings are for.

    Raises:
        ExportError: transformers has no hidden layers of that width.
    """
    dim = architecture["embed_dim"]
    swiglu = "blocks.0.mlp.w3.weight" in tensors
    hidden = _hidden(tensors, swiglu)
    ratio = next((ratio for ratio in range(1, 65) if _hidden_width(dim, ratio, swiglu) == hidden), None)
    if ratio is None:
        raise ExportError(
            f"Hugging Face's Dinov2 has hidden layers of a whole multiple of the width {dim}; this "
            f"network's have {hidden} channels: choose another format"
        )
    registers = {"num_register_tokens": tensors["register_tokens"].shape[1]} if "register_tokens" in tensors else {}
    return {
        "hidden_size": dim,
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "mlp_ratio": ratio,
        "use_swiglu_ffn": swiglu,
        "image_size": image_size,
        "patch_size": architecture["patch_size"],
        "num_channels": tensors["patch_embed.proj.weight"].shape[1],
        **registers,
    }


def _hidden_width(dim: int, ratio: float, swiglu: bool) -> int:
    """The channels of hidden layers in transformers' Dinov2, for a number of channels and ``mlp_ratio``."""
    hidden = int(dim * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def _is_width(hidden: int, dim: int, ratio: Any, swiglu: bool) -> bool:
    """Whether a ``mlp_ratio``, which a file may give as anything, stands for that many channels in hidden layers."""
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool) and math.isfinite(ratio)
    return is_number and hidden == _hidden_width(dim, ratio, swiglu)


def _hidden(tensors: Mapping[str, Tensor], swiglu: bool) -> int:
    """The channels that the hidden layers of these weights have."""
    return tensors[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1]


# What preprocessor_config.json says of images

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


def image_values(config: Mapping[str, Any], size: int) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Read from a ``preprocessor_config.json`` the mean and standard deviation of images on the range 0..1.

    transformers makes ``(pixel * rescale_factor - image_mean) / image_std`` of pixels 0..255; either part may be off.

    Args:
        config: The configuration of an image processor of transformers.
        size: The side in pixels to which ``Backbone.preprocess`` resizes images.

    Returns:
        ``mean`` and ``std``, and notes on what transformers does otherwise.

    Raises:
        WeightsError: The values are missing, or the file asks for something that cannot be done here.
    """
    if bad := [key for key in ("do_flip_channel_order", "offset", "rescale_offset") if config.get(key)]:
        raise WeightsError(
            f"it says {', '.join(f'{key}={config[key]}' for key in bad)}, which is not done here: features would be "
            "others. Give mean and std, and remove the file, if your images are made that way already"
        )
    notes: list[str] = []
    if config.get("do_normalize", True):
        values = {key: numbers(config, f"image_{key}") for key in ("mean", "std")}
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
    return values, notes + _unknown_keys(
        "preprocessor_config.json", config, _PREPROCESSOR_HELD | _PREPROCESSOR_NO_EFFECT
    )


def preprocessor_of(image: ImageInput, size: int) -> dict[str, Any]:
    """Describe how images are made for a backbone by the content of transformers' ``preprocessor_config.json``.

    Args:
        image: The images that the backbone expects.
        size: The side in pixels to which the whole image is resized.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": image.in_chans == 3,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _other_size(config: Mapping[str, Any], size: int) -> list[str]:
    """A note where transformers does not resize the whole image to ``size`` × ``size``, as this package does."""
    resized, cropped = config.get("do_resize", True), config.get("do_center_crop", False)
    sides = config.get("size")
    whole = isinstance(sides, Mapping) and (sides.get("height"), sides.get("width")) == (size, size)
    if resized and not cropped and (sides is None or sides == size or whole):
        return []
    ways = [
        *([f"size={short(sides)}"] if resized else ["do_resize=false"]),
        *([f"a centre crop of {short(config.get('crop_size'))}"] if cropped else []),
        *(["do_pad=true"] if config.get("do_pad") else []),
    ]
    return [
        f"preprocessor_config.json makes images by {', '.join(ways)}; here the whole image becomes {size} × {size} "
        "pixels, unless preprocess is given size and center_crop"
    ]


def _unknown_keys(name: str, config: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """A note on the keys of a file that this package does not know."""
    keys = [key for key, value in config.items() if key not in known and value is not None]
    if not keys:
        return []
    return [f"{name} also says {listed(keys)}, which is not known here: it may change what the model computes"]
