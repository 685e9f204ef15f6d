"""TextStream: whole characters, stop strings across token borders."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamatelemetry.inference.text_stream import TextStream


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte: every multi-byte character and stop string spans tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def stream(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    return pieces, stream.finish(), stream


def test_characters_come_whole(byte_tokenizer):
    pieces, rest, done = stream(byte_tokenizer, "aé漢🙂!")
    assert [p for p in pieces if p] == ["a", "é", "漢", "🙂", "!"]
    assert (rest, done.text, done.stopped) == ("", "aé漢🙂!", False)


def test_stop_string_is_cut_and_nothing_after_it_comes(byte_tokenizer):
    pieces, rest, done = stream(byte_tokenizer, "one END two", ["END"])
    assert "".join(pieces) == done.text == "one "
    assert (rest, done.stopped) == ("", True)


def test_what_only_begins_like_a_stop_string_is_released(byte_tokenizer):
    pieces, rest, done = stream(byte_tokenizer, "the EN", ["END", "ENTER"])
    assert "".join(pieces) == "the "
    assert (rest, done.text, done.stopped) == ("EN", "the EN", False)
    pieces, _, done = stream(byte_tokenizer, "ENENDx", ["END"])
    assert done.text == "EN"


def test_the_first_of_two_stop_strings_wins(byte_tokenizer):
    _, _, done = stream(byte_tokenizer, "a##b", ["##", "#"])
    assert done.text == "a"


def test_empty_stop_string_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
        TextStream(byte_tokenizer, ["x", ""])
