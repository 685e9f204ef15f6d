"""A GGUF model split over several files loads whole, from any of them."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf_models import finish, write_model

from llamatelemetry.loading.find import load_gguf
from llamatelemetry.loading.gguf_file import GgufFile, ModelFileError


def split(path, folder, parts):
    """Writes the file's tensors into so many files, as llama.cpp's gguf-split does."""
    reader = gguf.GGUFReader(path)
    files = []
    for number in range(parts):
        name = folder / f"m-{number + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(name, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    sub_type = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub_type)
        else:
            writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
        files.append(name)
    return files


@pytest.fixture
def files(tmp_path):
    write_model(tmp_path / "whole.gguf")
    return split(tmp_path / "whole.gguf", tmp_path, 3)


def test_any_of_the_files_is_the_model(tmp_path, files):
    ids = torch.tensor([[5, 70, 6, 200]])
    whole = load_gguf(tmp_path / "whole.gguf").model(ids).logits
    for file in files:
        assert torch.equal(load_gguf(file).model(ids).logits, whole)


def test_a_file_that_is_not_there_is_named(files):
    files[1].unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003.gguf: cannot be read"):
        load_gguf(files[0])


def test_another_name_is_refused(tmp_path, files):
    other = files[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"one file of 3: its name must end in -00001-of-0000"):
        load_gguf(other)


def test_files_of_another_model_are_refused(files):
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003.gguf: must be file 2 of 3, got 3"):
        GgufFile(files[0])


def test_tensors_that_no_file_holds_are_missed(files):
    whole = GgufFile(files[0])
    files[1].unlink()
    files[2].unlink()
    one = next(iter(whole.tensors))
    for number, file in enumerate(files[1:], 1):
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_tensor(one, torch.zeros(1, 2).numpy())
        finish(writer)
    with pytest.raises(ModelFileError, match=r"the 3 files must hold \d+ tensors, got \d+"):
        GgufFile(files[0])


def test_one_file_of_one_is_whole(tmp_path):
    write_model(tmp_path / "any.gguf", extra=lambda writer: writer.add_uint16("split.count", 1))
    assert load_gguf(tmp_path / "any.gguf").context_length == 64
