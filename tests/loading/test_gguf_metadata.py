"""Every value of a GGUF file's metadata that is none: one sentence, at once."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from gguf_models import write_model

from llamatelemetry.loading.find import load_gguf
from llamatelemetry.loading.gguf_file import ModelFileError

KINDS = gguf.GGUFValueType


def with_value(key, value, kind=None):
    """Puts a value of any kind, right or wrong, into the file."""

    def put(writer):
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(
            value=value, type=KINDS.get_type(value) if kind is None else kind
        )

    return put


def refusal(tmp_path, **changes):
    path = tmp_path / "model.gguf"
    write_model(path, **changes)
    with pytest.raises(ModelFileError) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "kind", "sentence"),
    [
        ("attention.head_count", 0, KINDS.UINT32, "head_count must be positive"),
        ("attention.head_count", 7, KINDS.UINT32, "must be a multiple of the key heads' 2"),
        ("attention.head_count", 2**31 - 1, KINDS.UINT32, "must be a multiple of the key heads'"),
        ("attention.head_count", [8, 8], KINDS.ARRAY, r"must be int, got [8, 8]"),
        ("attention.head_count_kv", 0, KINDS.UINT32, "head_count_kv must be positive"),
        ("attention.head_count_kv", 3, KINDS.UINT32, "must be a multiple of the key heads' 3"),
        ("attention.key_length", 0, KINDS.UINT32, "key_length must be positive"),
        ("embedding_length", 0, KINDS.UINT32, "embedding_length must be positive"),
        ("embedding_length", 255, KINDS.UINT32, "not a multiple of the number of attention heads"),
        ("context_length", 0, KINDS.UINT32, "context_length must be positive"),
        ("block_count", 0, KINDS.UINT32, "block_count must be positive"),
        ("block_count", -1, KINDS.INT32, "block_count must be positive"),
        ("block_count", 1, KINDS.UINT32, "block_count must be 2, as the tensors' blocks are"),
        ("block_count", 10**7, KINDS.UINT32, "block_count must be 2, as the tensors' blocks are"),
        ("block_count", True, KINDS.BOOL, "block_count must be int, got True"),
        ("rope.freq_base", 0.0, KINDS.FLOAT32, "freq_base must be positive and finite, got 0.0"),
        ("rope.freq_base", math.nan, KINDS.FLOAT32, "freq_base must be positive and finite"),
        ("rope.scaling.factor", -2.0, KINDS.FLOAT32, "factor must be positive and finite"),
        ("attention.layer_norm_rms_epsilon", math.inf, KINDS.FLOAT32, "must be positive"),
        ("expert_used_count", 2, KINDS.UINT32, "expert_used_count = 2 is not known here"),
        ("rope.scaling.attn_factor", 2.0, KINDS.FLOAT32, "attn_factor = 2.0 is not known here"),
        ("attention.causal", False, KINDS.BOOL, "attention.causal = False is not known here"),
    ],
)
def test_sizes_are_held_to_what_they_may_be(tmp_path, key, value, kind, sentence):
    assert sentence in refusal(tmp_path, extra=with_value(f"llama.{key}", value, kind))


@pytest.mark.parametrize("name", ["eos", "bos", "eot", "padding", "unknown"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [("2", KINDS.STRING), (2.0, KINDS.FLOAT32), ([2], KINDS.ARRAY), (True, KINDS.BOOL)],
)
def test_a_token_s_id_is_an_integer(tmp_path, name, value, kind):
    key = f"tokenizer.ggml.{name}_token_id"
    sentence = f"{key} must be int, got {value!r}"
    assert sentence in refusal(tmp_path, extra=with_value(key, value, kind))


def test_a_token_s_id_is_one_of_the_tokens(tmp_path):
    key = "tokenizer.ggml.eos_token_id"
    for value in (10**6, -7):
        extra = with_value(key, value, KINDS.INT32)
        assert f"must be one of the 293 tokens' ids, got {value}" in refusal(tmp_path, extra=extra)
    write_model(tmp_path / "none.gguf", extra=with_value(key, -1, KINDS.INT32))
    assert load_gguf(tmp_path / "none.gguf").eos_ids == ()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tokens", [1] * 293, "must hold str values, got 1 at 0"),
        ("merges", [1, 2], "must hold str values, got 1 at 0"),
        ("merges", ["a b c"], "damaged: tokenizer.ggml.merges"),
        ("token_type", ["a"] * 293, "must hold int values, got 'a' at 0"),
        ("token_type", [1, 1], "must have a value for each of the 293 tokens, got 2"),
    ],
)
def test_lists_of_the_tokenizer(tmp_path, key, value, sentence):
    extra = with_value(f"tokenizer.ggml.{key}", value, KINDS.ARRAY)
    assert sentence in refusal(tmp_path, extra=extra)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([0.0] * 4, "must have a value for each of the 293 tokens, got 4"),
        (["a"] * 293, "must hold float values, got 'a' at 0"),
        ([math.nan] * 293, "must hold numbers, got a NaN"),
        (None, "tokenizer.ggml.scores is missing"),
    ],
)
def test_scores(tmp_path, scores, sentence):
    def extra(writer):
        writer.kv_data[0]["tokenizer.ggml.model"].value = "llama"
        if scores is not None:
            with_value("tokenizer.ggml.scores", scores, KINDS.ARRAY)(writer)

    assert sentence in refusal(tmp_path, extra=extra)


def test_a_token_of_a_million_characters(tmp_path):
    def extra(writer):
        writer.kv_data[0]["tokenizer.ggml.model"].value = "llama"
        writer.kv_data[0]["tokenizer.ggml.tokens"].value[7] = "a" * 10**6
        with_value("tokenizer.ggml.scores", [0.0] * 293, KINDS.ARRAY)(writer)

    assert "a token must have at most 4096 characters" in refusal(tmp_path, extra=extra)


@pytest.mark.parametrize("template", [["a"], 3])
def test_a_chat_template_is_text(tmp_path, template):
    extra = with_value("tokenizer.chat_template", template)
    assert "tokenizer.chat_template must be str" in refusal(tmp_path, extra=extra)


@pytest.mark.parametrize(
    ("factors", "kind", "sentence"),
    [
        (np.ones(5, np.float32), None, "rope_freqs.weight must be (16,) and not quantised, got (5"),
        (np.zeros((1, 34), np.uint8), gguf.GGMLQuantizationType.Q8_0, "got (1, 32), Q8_0"),
        (np.zeros(16, np.float32), None, "must hold positive and finite factors"),
    ],
)
def test_rope_factors(tmp_path, factors, kind, sentence):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", factors, raw_dtype=kind)

    assert sentence in refusal(tmp_path, extra=extra)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear(tmp_path, key):
    path = tmp_path / "model.gguf"
    write_model(path, extra=with_value(f"llama.{key}", 4.0, KINDS.FLOAT32))
    config = load_gguf(path).model.config
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4)


def test_neutral_values_change_nothing(tmp_path):
    def extra(writer):
        with_value("llama.attention.causal", True)(writer)
        with_value("llama.rope.scaling.attn_factor", 1.0, KINDS.FLOAT32)(writer)
        with_value("llama.expert_count", 0, KINDS.UINT32)(writer)

    write_model(tmp_path / "model.gguf", extra=extra)
    assert load_gguf(tmp_path / "model.gguf").context_length == 64


def test_a_big_endian_file_is_called_so(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="a big-endian file; only little-endian"):
        load_gguf(path)
