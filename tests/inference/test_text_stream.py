"""TextStream: whole characters, stop strings across token borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def byte_fallback_tokenizer():
    """As SentencePiece has it: a token for each byte beside whole pieces."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {"a": 256, "▁hi": 257, "lo": 258, "</s>": 259}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)])
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def decoded(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    text = "".join([stream.push(i) for i in ids]) + stream.finish()
    assert text == stream.text
    return text


def test_bytes_that_are_no_character(byte_tokenizer):
    fallback = byte_fallback_tokenizer()
    assert decoded(fallback, [0x61, 0xE2, 256]) == "a\ufffda"
    assert decoded(fallback, [0xE2, 0x82]) == "\ufffd"
    for data in (b"\xc3\xa9\xc3\xc3\xa9x", b"\xff" * 5, b"\xf0\x9fA", b"\xe2\x82\xc3\xa9"):
        assert decoded(fallback, list(data)) == data.decode(errors="replace")
        letters = bytes_to_unicode()
        ids = byte_tokenizer.convert_tokens_to_ids([letters[byte] for byte in data])
        assert decoded(byte_tokenizer, ids) == data.decode(errors="replace")
        assert decoded(byte_tokenizer, ids) == byte_tokenizer.decode(ids)


@given(
    st.lists(
        st.sampled_from([(256,), (257,), (258,), (259,), *map(tuple, map(str.encode, "é🙂日x"))])
    )
)
def test_text_is_that_of_all_ids_at_once(chosen):
    tokenizer = byte_fallback_tokenizer()
    ids = [token for tokens in chosen for token in tokens]
    assert decoded(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_in_python_and_one_of_words(byte_tokenizer):
    class InPython:
        all_special_ids = (0,)

        def decode(self, ids, skip_special_tokens):
            return " ".join(f"w{i}" for i in ids if i or not skip_special_tokens)

    assert decoded(InPython(), [1, 0, 2, 3]) == "w1 w2 w3"
    assert decoded(InPython(), [1, 2, 3], "2 w") == "w1 w"
    vocabulary = {"[UNK]": 0, "hello": 1, "##lo": 2, "wor": 3, ",": 4}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = [1, 4, 3, 2, 1, 1, 4, 4, 3, 2, 2, 1]
    assert decoded(words, ids) == words.backend_tokenizer.decode(ids)


def test_an_open_character_ends_as_decode_ends_it(byte_tokenizer):
    ids = byte_tokenizer.encode("a🙂")[:-1]
    assert decoded(byte_tokenizer, ids) == byte_tokenizer.decode(ids) == "a\ufffd"


def test_empty_stop_string_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
        TextStream(byte_tokenizer, ["x", ""])
