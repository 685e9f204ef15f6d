"""The files of a transformers directory, looked at before anything is built from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamatelemetry.loading.errors import ModelFileError, sentence_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_POINTER = b"version https://git-lfs"  # what git leaves where a large file was not fetched
_MANY_LAYERS = 512  # no model has more; a config that asks for them is held to its weights
_LAYER = re.compile(r"\b(?:layers|h|blocks|block)\.(\d{1,9})\.")
_MAY_BE_LISTS = {"chat_template.json", "special_tokens_map.json", "vocab.json"}


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ModelFileError: it cannot be read, or holds no object.
    """
    try:
        data = path.read_bytes()
        refuse_pointer(path, data)
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: must be JSON: {sentence_of(error)}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: must be a JSON object, got {type(found).__name__}")
    return found


def refuse_pointer(path: Path, data: bytes) -> None:
    """Refuses what git LFS left in the place of a file."""
    if data.startswith(_POINTER):
        raise ModelFileError(
            f"{path}: is a pointer of git LFS, not the file itself; fetch it with git lfs pull"
        )


def check_directory(path: Path) -> dict[str, Any]:
    """Holds every JSON file and the header of every weight file to what it should be.

    Returns:
        config.json.

    Raises:
        ModelFileError: naming the file.
    """
    config = json_object(path / "config.json")
    for file in sorted(path.glob("*.json")):
        if file.name not in _MAY_BE_LISTS:
            json_object(file)
    highest = -1
    for file in weight_files(path):
        for name in tensor_names(file):
            highest = max([highest, *map(int, _LAYER.findall(name))])
    count = config.get("num_hidden_layers")
    if isinstance(count, int) and count > max(_MANY_LAYERS, highest + 1) and highest >= 0:
        raise ModelFileError(
            f"{path / 'config.json'}: num_hidden_layers must be that of the weights, "
            f"{highest + 1}, got {count}"
        )
    return config


def weight_files(path: Path) -> Iterator[Path]:
    """The safetensors files that transformers would read; none where there are others."""
    if (path / WEIGHTS).is_file():
        yield path / WEIGHTS
    elif (path / INDEX).is_file():
        places = json_object(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ModelFileError(f"{path / INDEX}: weight_map must name a file for each tensor")
        for name in sorted(set(places.values())):
            if not (path / name).is_file():
                raise ModelFileError(f"{path / name}: is missing, and {INDEX} names it")
            yield path / name


def tensor_names(path: Path) -> list[str]:
    """Of a safetensors file, from its header.

    Raises:
        ModelFileError: it is damaged, cut, or a pointer.
    """
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            refuse_pointer(path, file.read(len(_POINTER)))
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except ModelFileError:
        raise
    except Exception as error:  # safetensors has an exception of its own
        reason = sentence_of(error).removeprefix("SafetensorError: ")
        raise ModelFileError(f"{path}: is damaged or cut short: {reason}") from None
