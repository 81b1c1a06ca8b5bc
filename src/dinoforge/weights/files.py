"""Tensors as files hold them: safetensors, PyTorch files, and weights in several files."""

import argparse
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dinoforge.errors import WeightsError
from dinoforge.weights.configs import read_json
from dinoforge.weights.words import described, listed


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read the header and the content of a safetensors or PyTorch file; nothing in it can run code.

    Returns:
        The metadata of a safetensors file, empty for PyTorch's, and what stands in the file by name.

    Raises:
        WeightsError: The file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        with path.open("rb") as opened:
            start = opened.read(9)
        # Safetensors begin with the length of their header, which may be the numbers that other files begin with.
        if start[8:] != b"{" and (start.startswith(b"PK") or start[:1] == b"\x80"):  # zip archive, pickle
            return {}, _read_pickle(path)
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    """Read a PyTorch file by the unpickler that runs no code."""
    try:
        # A Namespace, in which DINO's checkpoints keep their arguments, is a bag of values: making one runs no code
        # that a file could choose, and each of its values has to be allowed by itself.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make it stumble over
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"holds more than tensors and plain values, {named[1]}, and could run code"
            if named
            else "is damaged, or holds more than tensors and plain values and could run code"
        )
        raise WeightsError(
            f"{path} {what} ({type(error).__name__}): nothing of it was run. Save the state dict alone"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors, got {described(state)}")
    return state


def read_sharded(index: Path) -> dict[str, Any]:
    """Read the tensors of all files that an index names, each from the file that it says.

    Args:
        index: A ``*.index.json`` of Hugging Face's.

    Raises:
        WeightsError: The index, one of its files or one of its tensors is missing or damaged, or leads out of its
            folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsError(
            f"{index}: expected weight_map, which names the file of each tensor, got {described(shards)}"
        )
    names = sorted(set(shards.values()))
    # By name, not by where links lead: Hugging Face's cache is a folder of links.
    if outside := [name for name in names if _leads_out(name)]:
        raise WeightsError(f"{index} names files outside its folder: {listed(outside)}. They are not read")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(
            f"{index} names {len(names)} files, of which {len(missing)} are not there: {listed(missing)}. Get them too"
        )
    state: dict[str, Any] = {}
    for name in names:
        _, tensors = read_tensors(index.parent / name)
        state |= {key: value for key, value in tensors.items() if shards.get(key) == name}
    if absent := [f"{key} in {shard}" for key, shard in shards.items() if key not in state]:
        raise WeightsError(f"{index} names tensors that are not there: {listed(absent)}. Get these files again")
    return state


def _leads_out(name: str) -> bool:
    """Whether a path leads out of its folder, by the rules of Windows or of POSIX."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return bool(windows.drive or windows.root or posix.root or ".." in windows.parts or ".." in posix.parts)
