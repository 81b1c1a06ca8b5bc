"""Hugging Face's format: a folder for ``AutoModel.from_pretrained`` and ``AutoImageProcessor.from_pretrained``."""

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dinoforge.export.content import Content, Format, Outputs, Rule, completed, library
from dinoforge.system.files import save_tensors
from dinoforge.version import __version__
from dinoforge.weights.hugging_face import config_of, preprocessor_of, to_hugging_face


def _write(content: Content, path: Path) -> list[str]:
    transformers = library("transformers")
    name = "Dinov2WithRegisters" if content.backbone.network.num_register_tokens else "Dinov2"
    tensors, notes = completed(content)
    arguments = config_of(content.backbone.architecture, content.tensors, content.size[0])
    config = getattr(transformers, f"{name}Config")(**arguments, architectures=[f"{name}Model"])
    path.mkdir()
    config.save_pretrained(path)
    save_tensors(to_hugging_face(tensors), path / "model.safetensors", {"format": "pt"})
    side = content.size[0] if content.fixed else content.backbone.image.size
    preprocessor = preprocessor_of(content.backbone.image, side)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    (path / "README.md").write_text(_card(content, side), encoding="utf-8")
    return [f"transformers.AutoModel.from_pretrained({path.name!r})", *notes]


def _card(content: Content, side: int) -> str:
    a, b = content.backbone.architecture, content.backbone
    trained = [f"- Training steps: {b.step:,}"] if b.step else []
    if images := b.metadata.get("images"):
        trained.append(f"- Training images: {images:,}, without labels")
    if recipe := b.metadata.get("recipe"):
        settings = json.dumps(recipe, indent=2)
        trained.append(f"\n<details><summary>Recipe</summary>\n\n```json\n{settings}\n```\n\n</details>")
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-feature-extraction",
            "tags: [dinov2, dinoforge]",
            "---",
            "",
            "# Image features",
            "",
            "A vision transformer that was pretrained without labels by the method of "
            "[DINOv2](https://arxiv.org/abs/2304.07193). It turns an image into one feature (the cls token) and one "
            "for each patch; it classifies nothing by itself.",
            "",
            "```python",
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            'processor = AutoImageProcessor.from_pretrained("path/of/this/folder")',
            'model = AutoModel.from_pretrained("path/of/this/folder")',
            'tokens = model(**processor(image, return_tensors="pt")).last_hidden_state',
            f"cls, patches = tokens[:, 0], tokens[:, {1 + b.network.num_register_tokens}:]",
            "```",
            "",
            f"- Width {a['embed_dim']}, {a['depth']} blocks, {a['num_heads']} heads, patches of {a['patch_size']} × "
            f"{a['patch_size']} pixels, {b.network.num_register_tokens} register tokens",
            f"- Images: {b.image.in_chans} channels, the whole image resized to {side} × {side} pixels, mean "
            f"{list(b.image.mean)}, standard deviation {list(b.image.std)}",
            *(
                [f"- Values: levels 0 to 255 as `dinoforge.read_image(image, {b.image.rule})` gives them"]
                if b.image.rule
                else []
            ),
            *trained,
            f"- Written by dinoforge {__version__}",
            "",
            "Say here what images it was trained on, what it may be used for, and under which licence.",
            "",
        ]
    )


def _open(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    transformers = library("transformers")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    first_patch = 1 + content.backbone.network.num_register_tokens

    def run(images: Tensor) -> Outputs:
        tokens = model(images).last_hidden_state  # [B, 1+R+N, D]
        return tokens[:, 0], tokens[:, first_patch:]

    return run


def _rule(content: Content) -> Rule:
    return bool(content.backbone.network.num_register_tokens), 0.0


HUGGING_FACE = Format("transformers", (), True, _rule, _write, _open)
