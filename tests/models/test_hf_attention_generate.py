"""Generation with our attention gives the tokens of transformers' eager one."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import CASES, CAUSAL, SEQLEN, build, inputs_of
from torch.testing import assert_close
from transformers.cache_utils import QuantizedLayer

from llamatelemetry.inference.flash_attn import enable_flash_attention


def greedy(model, side, **options):
    inputs = inputs_of("llama", side, model.device)
    return model.generate(
        **inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, disable_compile=True, **options
    )[:, SEQLEN:].tolist()


# transformers' own masks of chunks do not take a static cache.
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        (name, cache)
        for name in CAUSAL
        for cache in ("dynamic", "static")
        if (name, cache) != ("llama4_chunked", "static")
    ],
)
def test_greedy_tokens(name, cache, device):
    model = build(name, device=device)
    options = {"cache_implementation": cache}
    want = [greedy(model, side, **options) for side in ("none", "left", "right")]
    enable_flash_attention(model)
    assert [greedy(model, side, **options) for side in ("none", "left", "right")] == want


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 5}],
    ids=["beams", "prompt_lookup", "chunked_prefill"],
)
def test_other_ways_to_generate(name, options, device):
    model = build(name, device=device)
    lookup = "prompt_lookup_num_tokens" in options

    def tokens():
        if not lookup:
            return greedy(model, "left", **options)
        ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]], device=device)
        return model.generate(
            ids, max_new_tokens=8, do_sample=False, eos_token_id=2, **options
        ).tolist()

    want = tokens()
    enable_flash_attention(model)
    assert tokens() == want


def test_assisted_generation(device):
    model, draft = build("llama", device=device), build("mistral", device=device)
    ids = inputs_of("llama", "none", device)["input_ids"][:1]
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    for each in (model, draft):
        enable_flash_attention(each)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", [name for name in ("bart", "whisper", "t5") if name in CASES])
def test_encoder_decoders_generate(name, device):
    inputs = inputs_of(name, "right", device)
    decoder = inputs.pop("decoder_input_ids")[:, :1]
    model = build(name, device=device)

    def tokens():
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
        return model.generate(**inputs, decoder_input_ids=decoder, **options).tolist()

    want = tokens()
    enable_flash_attention(model)
    assert tokens() == want


def test_more_than_one_chunk_and_a_gap(device):
    """A prompt padded on the right and then more tokens at once, in a window and without one."""
    for name in ("llama", "mistral"):
        model = build(name, device=device)
        inputs = inputs_of(name, "right", device)

        def logits(model=model, inputs=inputs):
            past = transformers.DynamicCache(config=model.config)
            model(**inputs, past_key_values=past)
            mask = inputs["attention_mask"]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 3)], 1)
            ids = inputs["input_ids"][:, :3]
            return model(ids, attention_mask=mask, past_key_values=past).logits

        want = logits()
        enable_flash_attention(model)
        assert_close(logits(), want)


class RoundedLayer(QuantizedLayer):
    """The quantised cache of transformers with 8 bits and one scale, instead of a backend's."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_quantised_cache(name, device):
    model = build(name, device=device)

    def tokens():
        past = transformers.Cache(layers=[RoundedLayer(residual_length=4) for _ in range(2)])
        return greedy(model, "left", past_key_values=past)

    want = tokens()
    enable_flash_attention(model)
    assert tokens() == want
