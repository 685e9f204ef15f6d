"""Reading GGUF files: values of every type, and a sentence for every broken file."""

import struct
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from gguf_models import finish

from llamatelemetry.loading.gguf_file import GgufFile, ModelFileError
from llamatelemetry.ops import QuantFormat


@pytest.fixture
def path(tmp_path):
    """A file with a value of every type and three tensors."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"):
        getattr(writer, f"add_{kind}")(kind, 7)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "naïve 日本")
    writer.add_array("strings", ["a", "", "Ġé"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_tensor("dense", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.arange(6, dtype=np.float16).reshape(2, 3))
    rows = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("rows", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    return path


def test_values(path):
    file = GgufFile(path)
    wanted = dict.fromkeys(("uint8", "uint16", "uint32", "uint64", "int8", "int64"), 7)
    wanted |= {"float32": 0.5, "float64": 0.1, "bool": True, "string": "naïve 日本"}
    wanted |= {"strings": ["a", "", "Ġé"], "ints": [1, -2, 3], "general.architecture": "llama"}
    assert {key: file.metadata[key] for key in wanted} == wanted
    dense, half, rows = (file.tensors[name] for name in ("dense", "half", "rows"))
    assert torch.equal(file.dense(dense), torch.arange(6.0).view(2, 3))
    assert torch.equal(file.dense(half), torch.arange(6.0).half().view(2, 3))
    assert (rows.shape, rows.format, dense.format) == ((2, 32), QuantFormat.Q8_0, None)
    assert torch.equal(file.rows(rows), torch.arange(68, dtype=torch.uint8).view(2, 34))
    file.release(rows)
    assert torch.equal(file.rows(rows), torch.arange(68, dtype=torch.uint8).view(2, 34))


def test_value_says_what_is_wrong(path):
    file = GgufFile(path)
    assert file.value("absent", int, 3) == 3
    with pytest.raises(ModelFileError, match="metadata key absent is missing"):
        file.value("absent", int)
    with pytest.raises(ModelFileError, match="metadata key string must be int, got 'naïve 日本'"):
        file.value("string", int)


def test_every_truncation_is_named(path):
    whole = path.read_bytes()
    end = max(tensor.begin + tensor.num_bytes for tensor in GgufFile(path).tensors.values())
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"truncated|empty|not a GGUF file"):
            GgufFile(path)
    path.write_bytes(whole[:end])
    assert len(GgufFile(path).tensors) == 3


def test_a_damaged_byte_never_ends_in_another_exception(path):
    whole = bytearray(path.read_bytes())
    header = len(whole) - 200
    for at in range(0, header, 3):
        for value in (0, 255):
            damaged = whole.copy()
            damaged[at] = value
            path.write_bytes(damaged)
            with suppress(ModelFileError):
                GgufFile(path)


def test_refusals(tmp_path, path):
    def refuses(message):
        return pytest.raises(ModelFileError, match=message)

    with refuses("No such file or directory"):
        GgufFile(tmp_path / "absent.gguf")
    with refuses("Is a directory"):
        GgufFile(tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\3\4 and more")
    with refuses(r"other.gguf: not a GGUF file: it begins with b'PK"):
        GgufFile(other)
    other.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with refuses(r"GGUF version must be one of \[2, 3\], got 1"):
        GgufFile(other)
    writer = gguf.GGUFWriter(other, "llama")
    rows = np.zeros((2, 66), np.uint8)
    writer.add_tensor("ffn", rows, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    finish(writer)
    with refuses(
        "tensor ffn has type IQ2_XXS, which no kernel reads; supported: F32, F16, BF16, Q4_0.*"
        r"transformers dequantise the file: .*from_pretrained\(.*, gguf_file='other.gguf'\)"
    ):
        GgufFile(other)
