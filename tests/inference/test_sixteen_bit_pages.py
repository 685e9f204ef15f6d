"""Float32 models on the CPU over pages of float16 and bfloat16: batches, the engine, commands."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, alone, is_free
from directories import write_directory
from families import tiny_model
from gguf_models import write_model

from llamatelemetry.cli import cache_dtype
from llamatelemetry.cli.main import main
from llamatelemetry.inference import packed, running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.kv_cache import PagedKVCache
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import load_model
from llamatelemetry.models.opset import NATIVE, REFERENCE
from llamatelemetry.models.patching import patch

STORED = pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
SIZES = {"num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8}


def assert_nearly(model, prompt, ours, wanted):
    """Equal up to a token where the model's own logits of both are close."""
    same = next((i for i in range(len(wanted)) if ours[i] != wanted[i]), None)
    if same is not None:
        logits = model(torch.tensor([prompt + wanted[:same]])).logits[0, -1]
        gap = logits[wanted[same]] - logits[ours[same]]
        assert gap < 0.05 * logits.std(), (gap, logits.std())


def test_pages_keep_rounded_rows():
    cache = PagedKVCache(num_blocks=6, block_size=4, dtype=torch.float16, device="cpu", **SIZES)
    cache.allocate("a", 6)
    k, v = torch.randn(2, 6, 3, 8)
    cache.update(1, k, v, cache.slot_mapping("a"))
    for kept, given in zip(cache.get(1, "a"), (k, v), strict=True):
        assert torch.equal(kept, given.half())


@STORED
def test_batches(stored, monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model = tiny_model("llama")
    patch(model)
    options = {"num_blocks": 14, "num_host_blocks": 30, "cache_dtype": stored}
    batcher = ContinuousBatching(5, model, **options)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some go to the host
    pairs = list(zip(PROMPTS, COUNTS, strict=True))
    handles = [batcher.submit(prompt, max_tokens=count) for prompt, count in pairs]
    batcher.run()
    pages = batcher._batch._runner.runner.pages
    assert (pages.dtype, pages.model_dtype) == (stored, torch.float32)
    assert sum(handle.stats.preemptions for handle in handles) > 0
    for (prompt, count), handle in zip(pairs, handles, strict=True):
        assert_nearly(model, prompt, handle.result().token_ids, alone(model, prompt, count))
    assert is_free(batcher)


@pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16, torch.int8], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("ops", [NATIVE, REFERENCE], ids=["native", "reference"])
def test_generation(stored, ops):
    model = tiny_model("llama")
    patch(model, ops=ops)
    generator = TokenGenerator(model, cache_dtype=stored)
    rows = list(generator.generate(PROMPTS, [GREEDY] * len(PROMPTS), 12))
    assert generator.decode_mode == ("recorded" if ops is NATIVE else "eager")
    assert generator.runner.pages.dtype == stored
    for row, prompt in enumerate(PROMPTS):
        assert_nearly(model, prompt, [step[row] for step in rows], alone(model, prompt, 12))


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"^cache_dtype must be None, .*, got torch\.float64$"):
        TokenGenerator(model, cache_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^cache_dtype must be the model's own where t"):
        TokenGenerator(model, "it is odd", torch.float16)
    TokenGenerator(model, "it is odd", torch.float32)  # its own
    plain = replace(NATIVE, converts_caches=False, name="plain")
    patch(model, ops=plain)
    for stored in (torch.int8, torch.float16):
        with pytest.raises(ValueError, match="own for one patched with plain ops, got torch"):
            TokenGenerator(model, cache_dtype=stored)
    halved = tiny_model("llama").bfloat16()
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch.float16 and a model of t"):
        ContinuousBatching(2, halved, cache_dtype=torch.float16)
    ContinuousBatching(2, halved, cache_dtype=torch.bfloat16)  # its own
    with pytest.raises(ValueError, match=r"got torch.float32 and a model of torch.bfloat16 on cpu"):
        ContinuousBatching(2, halved, cache_dtype=torch.float32)
    batcher = ContinuousBatching(2, tiny_model("llama"), cache_dtype=torch.float32)
    assert len(batcher.submit([5, 9, 2], max_tokens=3).result().token_ids) == 3


@pytest.mark.parametrize("reason", [None, "it is odd"])
def test_a_refused_engine_leaves_the_model_as_it_was(tmp_path, monkeypatch, reason):
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama")
    loaded = load_model(path, device="cpu", dtype=torch.float32 if reason else torch.bfloat16)
    before = dict(vars(loaded.model)), loaded.model.config._attn_implementation
    tried = []

    def refused(model, **options):
        tried.append(model)
        raise ValueError(reason)

    if reason is not None:
        monkeypatch.setattr(packed, "patch", refused)
    with pytest.raises(ValueError, match=r"^cache_dtype must be .*torch\.float16"):
        InferenceEngine(loaded, cache_dtype=torch.float16)
    assert bool(tried) == (reason is not None)
    assert (vars(loaded.model), loaded.model.config._attn_implementation) == before


def test_a_refused_engine_keeps_what_was_patched():
    model = tiny_model("llama")
    patch(model, ops=replace(NATIVE, converts_caches=False, name="plain"))
    with pytest.raises(ValueError, match="own for one patched with plain ops"):
        packed.patch_or_reason(model, None, torch.float16)
    assert "_llamatelemetry" in vars(model)


def test_a_model_without_packed_steps():
    model = tiny_model("llama")
    generator = TokenGenerator(model, cache_dtype=torch.float16)
    patch(model)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="own forward, with keys and values in its own dtype: "):
        next(generator.generate([PROMPTS[2]], [GREEDY], 2))
    for make in (TokenGenerator, lambda model, **options: packed.patch_or_reason(model, **options)):
        with pytest.raises(ValueError, match="the model's own where transformers' own forward"):
            make(model, cache_dtype=torch.float16)
    hook.remove()
    TokenGenerator(model, cache_dtype=torch.float16)


@pytest.mark.gpu
def test_a_gpu_keeps_the_model_s_own():
    model = tiny_model("llama", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"model float32 on the CPU, got torch\.float16"):
        ContinuousBatching(2, model, cache_dtype=torch.float16)


def test_transformers_generates_over_16_bits():
    model, ids = tiny_model("llama"), torch.tensor([PROMPTS[2]])
    sizes = {"num_layers": 2, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    cache = PagedKVCache(num_blocks=20, dtype=torch.bfloat16, device="cpu", **sizes)
    given = cache.for_transformers(["a"])
    out = model.generate(ids, past_key_values=given, max_new_tokens=8, do_sample=False)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert_nearly(
        model, PROMPTS[2], out[0, len(PROMPTS[2]) :], wanted[0, len(PROMPTS[2]) :].tolist()
    )
    assert cache.get(0, "a")[0].dtype == torch.bfloat16


def parsed(*words):
    parser = argparse.ArgumentParser()
    cache_dtype.add_cache_option(parser)
    return parser.parse_args([*words])


def test_names_of_the_option():
    assert cache_dtype.cache_dtype_of(parsed()) is None
    names = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "int8")
    found = [cache_dtype.cache_dtype_of(parsed("--kv-cache-dtype", name)) for name in names]
    fp8 = torch.float8_e4m3fn
    assert found == [None, torch.float16, torch.bfloat16, fp8, fp8, torch.int8]


def test_commands(capsys, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_model(path, "llama")
    kept = []
    allocated = TokenGenerator.__init__

    def seen(self, model, reason=None, stored=None):
        kept.append(stored)
        allocated(self, model, reason, stored)

    monkeypatch.setattr(TokenGenerator, "__init__", seen)
    asked = ["generate", "cat", "--model", str(path), "--device", "cpu", "--max-tokens", "9"]
    for more in ([], ["--num-speculative-tokens", "2"]):
        assert main([*asked, "--kv-cache-dtype", "float16", *more]) == 0
        assert "generated 9 tokens" in capsys.readouterr().err
    assert kept == [torch.float16] * 2
    engine = InferenceEngine(load_model(path, device="cpu"), cache_dtype=torch.float16)
    assert engine.infer("cat", max_tokens=3).success
    assert engine.generator.runner.pages.dtype == torch.float16


def test_serve_has_it(tmp_path):
    pytest.importorskip("fastapi")
    from llamatelemetry.cli import serve

    path = tmp_path / "tiny.gguf"
    write_model(path, "llama")
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    words = ["serve", str(path), "--device", "cpu", "--kv-cache-dtype", "bfloat16"]
    batcher, _ = serve._made(parser.parse_args(words))
    assert batcher._batch._runner.runner.pages.dtype == torch.bfloat16
    assert len(batcher.submit([5, 9, 2], max_tokens=3).result().token_ids) == 3


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_commands_refuse_by_their_option_s_name(command, capsys, tmp_path):
    if command == "serve":
        pytest.importorskip("fastapi")
        pytest.importorskip("uvicorn")
    write_directory(tmp_path, model=tiny_model("llama").bfloat16())
    words = ["cat", "--model", str(tmp_path)] if command == "generate" else [str(tmp_path)]
    words += ["--device", "cpu", "--kv-cache-dtype", "float16"]
    assert main([command, *words]) == 2
    said = capsys.readouterr().err
    assert "llamatelemetry: --kv-cache-dtype must be of 8 bits or the model's own" in said
    assert said.strip().endswith("torch.bfloat16 on cpu; auto is the model's own")
