"""A GGUF file, memory-mapped: its metadata, and its tensors as views of the mapping.

Read here rather than with gguf's GGUFReader because that makes a numpy array of every string of
the vocabulary: seconds where this takes a few hundredths.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.loading.errors import ModelFileError
from llamatelemetry.ops.formats import GGUF_FORMATS, QuantFormat

__all__ = ["GgufFile", "GgufTensor", "Metadata", "ModelFileError"]

Metadata = dict[str, Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# struct codes of the GGUF value types
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# How the files of a split model are called.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# GGML type numbers of the unquantised tensors
_DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, not read yet; shape is torch's (rows first)."""

    name: str
    shape: tuple[int, ...]
    type: int  # GGML type number
    begin: int  # bytes from the start of the file
    num_bytes: int
    map: mmap.mmap = field(repr=False, compare=False)  # of the file that holds it

    @property
    def format(self) -> QuantFormat | None:
        """None where the tensor is not quantised."""
        return GGUF_FORMATS.get(self.type)


class GgufFile:
    """Metadata and tensors of a GGUF file of version 2 or 3; of a split model, of all its files.

    Attributes:
        path: of the file
        metadata: key to number, string or list
        tensors: name to GgufTensor

    Raises:
        ModelFileError: missing, not a GGUF, truncated, or a tensor type without a kernel

    Source:
        https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def __init__(self, path: str | Path, *, shards: bool = True) -> None:
        self.path = Path(path)
        self.metadata: Metadata = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with self.path.open("rb") as file:
                # Copy-on-write pages: torch wants writable memory and nobody writes.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "the file is empty"
            raise ModelFileError(f"{self.path}: cannot be read: {reason}") from None
        if self._map[:4] != _MAGIC:
            raise self.error(f"not a GGUF file: it begins with {self._map[:4]!r}")
        try:
            self._read()
        except (struct.error, EOFError):
            size = len(self._map)
            raise self.error(f"truncated: its header does not end in {size} bytes") from None
        except UnicodeDecodeError as error:
            raise self.error(f"damaged: a string is not UTF-8 ({error.reason})") from None
        if shards and self.value("split.count", int, 1) > 1:
            self._add_shards()

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")

    def unserved(self, what: str) -> ModelFileError:
        """An error for a sound file that nothing here reads: it names the way that may."""
        folder, name = str(self.path.parent), self.path.name
        return self.error(
            f"{what}; the original model's directory may load, or let transformers dequantise the "
            f"file: AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={name!r})"
        )

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """metadata[key], checked to be of the kind; without a default the key must be there."""
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(f"metadata key {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"metadata key {key} must be {kind.__name__}, got {value!r:.80}")
        return value

    def values(self, key: str, kind: type, default: Any = None) -> list[Any]:
        """metadata[key], a list whose every element is of the kind."""
        found: list[Any] = self.value(key, list, default)
        for i, element in enumerate(found):
            if type(element) is not kind:
                raise self.error(
                    f"metadata key {key} must hold {kind.__name__} values, got {element!r:.80} "
                    f"at {i}"
                )
        return found

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """A number among the metadata that must be finite and above zero."""
        value = self.value(key, kind, default)
        if not 0 < value < math.inf:
            raise self.error(f"metadata key {key} must be positive and finite, got {value}")
        return value

    def dense(self, tensor: GgufTensor) -> Tensor:
        """A tensor that is not quantised, as a view of the mapping."""
        count = math.prod(tensor.shape)
        values = torch.frombuffer(
            tensor.map, dtype=_DENSE[tensor.type], count=count, offset=tensor.begin
        )
        return values.view(tensor.shape)

    def rows(self, tensor: GgufTensor) -> Tensor:
        """The raw rows of a quantised tensor, [n, row_bytes] uint8, as a view of the mapping."""
        raw = torch.frombuffer(
            tensor.map, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.begin
        )
        return raw.view(math.prod(tensor.shape[:-1]), -1)

    def release(self, tensor: GgufTensor) -> None:
        """Gives back the pages that reading the tensor brought into memory."""
        page = mmap.PAGESIZE
        begin = -(-tensor.begin // page) * page
        length = tensor.begin + tensor.num_bytes - begin
        if length > 0:
            tensor.map.madvise(mmap.MADV_DONTNEED, begin, length)

    def _add_shards(self) -> None:
        """Takes in the tensors of the other files of a split model; the first has the metadata."""
        count, match = self.value("split.count", int), _SHARD.fullmatch(self.path.name)
        if match is None or int(match[3]) != count:
            raise self.error(
                f"one file of {count}: its name must end in -00001-of-{count:05}.gguf, so that the "
                "others are found"
            )
        names = [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, count + 1)]
        files = [
            self if name == self.path.name else GgufFile(self.path.with_name(name), shards=False)
            for name in names
        ]
        tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            if (found := file.value("split.no", int)) != number:
                raise file.error(f"must be file {number + 1} of {count}, got {found + 1}")
            tensors |= file.tensors
        self.metadata, self.tensors = files[0].metadata, tensors
        wanted = self.value("split.tensors.count", int, len(tensors))
        if len(tensors) != wanted:
            raise self.error(f"the {count} files must hold {wanted} tensors, got {len(tensors)}")

    def _read(self) -> None:
        self._offset = len(_MAGIC)
        version = self._scalar("I")
        if int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS:
            raise self.error("a big-endian file; only little-endian ones are read here")
        if version not in _VERSIONS:
            raise self.error(f"GGUF version must be one of {list(_VERSIONS)}, got {version}")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise self.error(f"damaged: metadata key {key} comes twice")
            self.metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.value("general.alignment", int, 32)
        if alignment <= 0:
            raise self.error(f"metadata key general.alignment must be positive, got {alignment}")
        data_begin = -(-self._offset // alignment) * alignment
        self.tensors = {info[0]: self._tensor(*info, data_begin) for info in infos}

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._scalars("Q", self._scalar("I"))
        return name, dims[::-1], self._scalar("I"), self._scalar("Q")

    def _tensor(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, data_begin: int
    ) -> GgufTensor:
        if number in _DENSE:
            weights, block_bytes = 1, _DENSE[number].itemsize
        elif number in GGUF_FORMATS:
            format = GGUF_FORMATS[number]
            weights, block_bytes = format.block_size, format.block_bytes
        else:
            supported = ", ".join(_type_name(n) for n in (*_DENSE, *GGUF_FORMATS))
            raise self.unserved(
                f"tensor {name} has type {_type_name(number)}, which no kernel reads; "
                f"supported: {supported}"
            )
        if not shape or shape[-1] % weights:
            raise self.error(f"tensor {name} of shape {shape} is not in whole blocks of {weights}")
        num_bytes = math.prod(shape) // weights * block_bytes
        end = data_begin + offset + num_bytes
        if end > len(self._map):
            raise self.error(
                f"truncated: tensor {name} ends at byte {end}, the file has {len(self._map)}"
            )
        return GgufTensor(name, shape, number, data_begin + offset, num_bytes, self._map)

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self._map, self._offset)
        self._offset += struct.calcsize(f"<{count}{code}")
        return values

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, offset, length_at = self._map, self._offset, struct.Struct("<Q").unpack_from
        strings, size = [], len(data)
        for _ in range(count):
            begin = offset + 8
            offset = begin + length_at(data, offset)[0]
            if offset > size:
                raise EOFError
            strings.append(data[begin:offset].decode())
        self._offset = offset
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._scalar("I"), self._scalar("Q")
            if element == _STRING:
                return self._strings(count)
            if element in _SCALARS:
                return list(self._scalars(_SCALARS[element], count))
            raise self.error(f"damaged or nested: an array of value type {element}")
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise self.error(f"damaged: a metadata value of type {kind}")


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType  # only a message needs it

    names = {int(member): name for name, member in GGMLQuantizationType.__members__.items()}
    return names.get(number, f"number {number}")
