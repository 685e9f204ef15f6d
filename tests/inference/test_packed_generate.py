"""generate of a patched model in the paged cache: plain generate's tokens, without its modules."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from families import FAMILIES, VOCAB, quantise_, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from llamatelemetry.inference import packed_rows
from llamatelemetry.inference.kv_cache import optimize_kv_cache, restore_kv_cache
from llamatelemetry.inference.packed_cache import PackedCache
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.models.patching import patch
from llamatelemetry.models.pieces.arguments import CACHE_NAMES
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.quantization.modules import QuantLinear

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
OPTIONS = {
    "sampled": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "returned": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 6, "eos_token_id": list(range(1, VOCAB, 2))},
    "eos": {"eos_token_id": list(range(1, VOCAB, 9)), "max_new_tokens": 30},
    "beams": {"num_beams": 3},
    "beam_samples": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "chunks": {"prefill_chunk_size": 5},
    "named": {"cache_implementation": "dynamic"},
}


@pytest.fixture
def models(device, monkeypatch):
    """Makes (plain, patched and optimised) models whose attention modules count their calls."""
    calls = []
    forward = Attention.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    def make(family, quantised=False):
        plain = tiny_model(family, device)
        with torch.inference_mode(False), torch.no_grad(), monkeypatch.context() as while_patched:
            if quantised:
                quantise_(plain)
                for module in plain.modules():
                    if isinstance(module, QuantLinear):
                        module.exact = True  # int8 activations would make ties of close tokens
            ours = copy.deepcopy(plain)
            while_patched.setattr(Attention, "forward", counted)
            patch(ours, strict=True)
            optimize_kv_cache(ours)
        calls.clear()
        return plain, ours, calls

    return make


def prompt(device, batch=2, padded=False):
    ids = torch.randint(1, VOCAB, (batch, 6), device=device).repeat(1, 2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, inputs, **asked):
    torch.manual_seed(7)
    return model.generate(**inputs, **GREEDY | asked)


def cache_of(output):
    return next(output[name] for name in CACHE_NAMES if name in output)


def blocks_of(model):
    """The block manager of a model's generations, after those that are over have ended."""
    gc.collect()
    model.forward.shared.free_ended()
    blocks = model.forward.shared.pages().blocks
    blocks.check()
    return blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_tokens(family, device, models):
    plain, ours, calls = models(family)
    inputs = prompt(device, padded=True)
    wanted = generated(plain, inputs)
    for _ in range(2):
        assert torch.equal(generated(ours, inputs), wanted)
    assert calls == []


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "ministral"])
def test_options_of_generate(family, options, quantised, device, models):
    plain, ours, calls = models(family, quantised)
    for padded in (False, True):
        inputs = prompt(device, padded=padded)
        wanted = generated(plain, inputs, **options)
        assert torch.equal(generated(ours, inputs, **options), wanted)
    assert calls == []
    assert blocks_of(ours).num_sequences == 0
    modes = {step.mode for step in ours.forward.shared.pages().runner.steps()}
    assert modes == {"graph" if device.type == "cuda" else "recorded"}


def test_long_prompts_run_in_pieces(device, models, monkeypatch):
    plain, ours, calls = models("mistral")
    monkeypatch.setattr(packed_rows, "PREFILL_TOKENS", {device.type: 5})
    inputs = prompt(device, padded=True)
    assert torch.equal(generated(ours, inputs), generated(plain, inputs))
    logits = {"logits_to_keep": 7}
    with torch.no_grad():
        cache = cache_of(generated(ours, prompt(device), return_dict_in_generate=True))
        cache.reset()
        name = next(name for name in CACHE_NAMES if name in ours.forward._parameters)
        got = ours(prompt(device)["input_ids"], **{name: cache}, **logits).logits
    assert got.shape == (2, 7, VOCAB)
    assert calls == []


def test_rows_of_one_prompt_run_it_once(device, models, monkeypatch):
    plain, ours, _ = models("llama")
    counts, prefill = [], StepRunner.prefill

    def counted(self, chunks, *args):
        counts.append(sum(len(chunk.tokens) for chunk in chunks))
        return prefill(self, chunks, *args)

    monkeypatch.setattr(StepRunner, "prefill", counted)
    inputs = prompt(device, padded=True)
    for options in (OPTIONS["returned"], OPTIONS["beams"]):
        assert torch.equal(generated(ours, inputs, **options), generated(plain, inputs, **options))
    assert counts == [20, 20]
    assert blocks_of(ours).num_sequences == 0


class Streamer(BaseStreamer):
    def __init__(self, between=lambda: None):
        self.tokens, self.between = [], between

    def put(self, value):
        self.tokens.append(value.flatten().tolist())
        self.between()

    def end(self):
        self.tokens.append("end")


def test_scores_streamers_and_stop_strings(device, models):
    plain, ours, calls = models("qwen3")
    inputs = prompt(device, batch=1)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted, got = (generated(model, inputs, **asked) for model in (plain, ours))
    assert torch.equal(got.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)
    streamers = Streamer(), Streamer()
    for model, streamer in zip((plain, ours), streamers, strict=True):
        generated(model, inputs, streamer=streamer)
    assert streamers[0].tokens == streamers[1].tokens
    words = {"abcdef": 0} | {f"w{i}": i for i in range(1, VOCAB)}  # transformers tries that word
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "abcdef")))
    stop = f"w{int(wanted.sequences[0, -5])}"
    stopped = {"stop_strings": [stop], "tokenizer": tokenizer}
    wanted = generated(plain, inputs, **stopped)
    assert wanted.shape[1] < 24
    assert torch.equal(generated(ours, inputs, **stopped), wanted)
    assert calls == []


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup_and_assistants(family, device, models):
    plain, ours, calls = models(family)
    inputs = prompt(device, batch=1)
    asked = {"eos_token_id": 1}  # transformers 5.10 looks one up
    wanted = generated(plain, inputs, **asked)
    assert torch.equal(generated(ours, inputs, prompt_lookup_num_tokens=3, **asked), wanted)
    if family == "llama":  # others' own windows cannot be cropped in every release
        assistant = optimize_kv_cache(copy.deepcopy(ours))
        for helper in (assistant, plain):
            assert torch.equal(generated(ours, inputs, assistant_model=helper, **asked), wanted)
    assert [piece for piece in calls if piece.module in set(ours.modules())] == []


def test_a_returned_cache_serves_on(device, models):
    plain, ours, calls = models("llama")
    inputs = prompt(device, padded=True)
    asked = {"return_dict_in_generate": True}
    turn = generated(ours, inputs, **asked)
    more = torch.randint(1, VOCAB, (2, 5), device=device)
    longer = {
        "input_ids": torch.cat([turn.sequences, more], 1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 17), value=1),
    }
    wanted = generated(plain, longer)
    name = next(name for name in CACHE_NAMES if name in turn)
    kept = turn[name]
    for cache in (copy.deepcopy(kept), copy.deepcopy(kept), kept):
        assert isinstance(cache, PackedCache)
        assert torch.equal(generated(ours, longer | {name: cache}), wanted)
        assert cache.get_seq_length() == wanted.shape[1] - 1
    assert calls == []


def test_a_cache_is_an_ordinary_one_for_who_asks(device, models):
    plain, ours, _ = models("ministral")
    inputs = prompt(device, padded=True)
    asked = {"return_dict_in_generate": True}
    got, wanted = (cache_of(generated(model, inputs, **asked)) for model in (ours, plain))
    assert len(got) == len(wanted)
    assert got.is_sliding == wanted.is_sliding
    for name in {"get_max_length", "get_max_cache_shape"} & set(dir(wanted)):
        assert getattr(got, name)() == -1
    assert (got.get_seq_length(), got.batch_size, got.is_initialized) == (23, 2, True)
    assert got.rows is not None
    copied = copy.deepcopy(got)
    for cache in (got, copied):
        for layer, theirs in zip(cache.layers, wanted.layers, strict=True):
            assert layer.get_seq_length() == theirs.get_seq_length()
            k, v = layer.update(*(x.new_zeros(2, 3, 0, 64) for x in (theirs.keys, theirs.values)))
            seen = theirs.keys.shape[2] - 1  # padding is not of interest
            for ours_, theirs_ in ((k, theirs.keys), (v, theirs.values)):
                torch.testing.assert_close(
                    ours_[1, :, -seen:], theirs_[1, :, -seen:], rtol=1e-4, atol=1e-4
                )
        assert cache.rows is None
    assert blocks_of(ours).num_sequences == 0


def test_interleaved_generations_are_each_their_own(device, models):
    plain, ours, calls = models("llama", quantised=True)
    inputs, others = prompt(device), prompt(device, padded=True)
    wanted, wanted_other = generated(plain, inputs), generated(plain, others)
    seen = []
    nested = Streamer(lambda: seen.append(ours.generate(**others, **GREEDY)))
    with torch.random.fork_rng():
        rows = ours.generate(**{k: x[:1] for k, x in inputs.items()}, **GREEDY, streamer=nested)
    assert torch.equal(rows, wanted[:1])
    assert all(torch.equal(other, wanted_other) for other in seen)
    assert len(seen) == 13
    assert calls == []


def test_blocks_come_back_and_are_used_again(device, models):
    _, ours, _ = models("llama")
    outputs = [generated(ours, prompt(device), return_dict_in_generate=True) for _ in range(3)]
    blocks = blocks_of(ours)
    assert blocks.num_sequences == 6
    count = blocks.num_blocks
    del outputs
    assert blocks_of(ours).num_sequences == 0
    for _ in range(5):
        generated(ours, prompt(device))
    assert (blocks_of(ours), blocks.num_blocks) == (blocks, count)
    restore_kv_cache(ours)
    assert not {"forward", "_prepare_cache_for_generation"} & ours.__dict__.keys()
