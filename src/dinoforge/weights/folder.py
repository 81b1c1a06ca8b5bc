"""Folders of other libraries' models: the file of the weights, and the configuration beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.weights import hugging_face, timm
from dinoforge.weights.configs import read_json
from dinoforge.weights.words import listed

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights in a Hugging Face folder; transformers takes the first that is there."""

INDICES = FILES[1::2]
"""The names among these of weights in several files."""

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"


def file_of_folder(path: Path) -> Path:
    """Find the file of weights in a Hugging Face folder.

    Raises:
        WeightsError: The folder has none.
    """
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        there = sorted(each.name for each in path.iterdir())
        raise WeightsError(
            f"{path} has no teacher.safetensors, which a run writes with its first checkpoint, and no "
            f"{' or '.join(FILES)}, as Hugging Face's folders have; it has {listed(there) if there else 'no files'}"
        )
    return file


@dataclass(frozen=True)
class Beside:
    """The files beside another library's weights.

    Args:
        folder: The folder of the files.
        config: The configuration of the model, by transformers or timm.
        images: The configuration of transformers' image processor.
        known: Arguments of ``VisionTransformer`` and ``ImageInput`` that tensors cannot say.
        notes: Notes on what had to be assumed or was passed over.
    """

    folder: Path
    config: Mapping[str, Any] | None = None
    images: Mapping[str, Any] | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def check_heads(self, given: Mapping[str, Any]) -> None:
        """Refuse another number of heads than the configuration says.

        Args:
            given: Arguments that the user has given.

        Raises:
            WeightsError: They contradict the configuration.
        """
        heads = self.known.get("num_heads")
        if heads is not None and given.get("num_heads", heads) != heads:
            raise WeightsError(
                f"{self.folder / _CONFIG} says num_heads={heads}, not {given['num_heads']}: what a file says cannot be "
                "given otherwise"
            )

    def hold(self, architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
        """Hold what the files say against the weights and against our network.

        Args:
            architecture: The arguments of ``VisionTransformer`` that the tensors imply.
            tensors: The weights under official names.

        Returns:
            ``mean`` and ``std`` where transformers says how images are made, and notes on what may differ.

        Raises:
            WeightsError: Outputs would not be those of the model that the files describe.
        """
        values: dict[str, Any] = {}
        notes: list[str] = []
        said_by = _CONFIG
        try:
            if self.config is not None and timm.is_config(self.config):
                timm.hold(self.config, architecture)
            elif self.config is not None:
                notes += hugging_face.hold(self.config, architecture, tensors)
            said_by = _PREPROCESSOR
            if self.images is not None:
                values, more = hugging_face.image_values(self.images, architecture["image_size"])
                notes += more
        except WeightsError as error:
            raise WeightsError(f"{self.folder / said_by}: {error}") from error
        return values, notes


def read_beside(file: Path, *, asked: bool) -> Beside:
    """Read the configuration beside a file of weights.

    Args:
        file: The weights.
        asked: Whether the user named the folder rather than the file, so that all that lies there belongs together.

    Raises:
        WeightsError: A configuration is damaged, or describes a model that this package does not have.
    """
    path, preprocessor = file.with_name(_CONFIG), file.with_name(_PREPROCESSOR)
    images = read_json(preprocessor) if preprocessor.is_file() else None
    if not path.is_file():
        return Beside(
            file.parent,
            images=images,
            notes=("no config.json beside the weights: assumed are the exact GELU and an epsilon of 1e-06",),
        )
    config = read_json(path)
    if not asked and not {"model_type", "architectures", "architecture", "hidden_size"} & set(config):
        return Beside(file.parent, notes=(f"{path} describes no model and is not read",))
    try:
        if timm.is_config(config):
            return Beside(file.parent, config, None, timm.arguments_of(config) | timm.image_values(config))
        return Beside(file.parent, config, images, hugging_face.arguments_of(config))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
