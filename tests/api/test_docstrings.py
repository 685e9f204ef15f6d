"""Every public name's docstring has an example, and it runs on a CPU as it stands.

An example may use torch, the public names of its package, `model` (a tiny transformers Llama of
random weights), `loaded` (the same as load_model returns it) and `directory` (where it is saved).
"""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamatelemetry import LoadedModel
from llamatelemetry.cuda import triton_registry

PACKAGES = ("cuda", "inference", "loading", "models", "profiling", "quantization")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(f"llamatelemetry.{package}").__all__
    if not name.isupper()  # a constant has no docstring
]


@pytest.fixture(scope="module")
def tiny():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.inference_mode(False):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), "tiny", ())


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    """No CUDA; torch's switches and the registry of kernels are afterwards as before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction
    kernels = dict(triton_registry._registry)
    yield
    matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction = before
    triton_registry._registry.clear()
    triton_registry._registry.update(kernels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_the_example_runs(package, name, tiny, directory, as_on_a_cpu):
    module = importlib.import_module(f"llamatelemetry.{package}")
    value = getattr(module, name)
    own = {public: getattr(module, public) for public in module.__all__}
    with torch.inference_mode(False):
        loaded = copy.deepcopy(tiny)
    given = {"loaded": loaded, "model": loaded.model, "directory": directory}
    names = own | {"torch": torch} | given
    assert value.__doc__, f"{name} has no docstring"
    test = doctest.DocTestParser().get_doctest(value.__doc__, names, name, None, 0)
    assert test.examples, f"{name}'s docstring has no example"
    said: list[str] = []
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        failed, tried = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert tried == len(test.examples)
    assert not failed, "".join(said)
