"""Tokenizers from metadata, against transformers' own conversion and against the text itself."""

import inspect
import re

import gguf
import pytest
from gguf_models import CONTROL, TEXT, add_tokenizer, byte_level_vocabulary, finish
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, tokenization_utils_tokenizers

from llamatelemetry.loading.gguf_file import GgufFile, ModelFileError
from llamatelemetry.loading.pre_tokenizers import NFC, PRE_TOKENIZERS
from llamatelemetry.loading.tokenizer import build_tokenizer, eos_ids

TEXTS = [
    "",
    "the cats sat on 2024 mats, and it's what they'll do",
    "  leading and   many   spaces\n\n\ttabs \r\n and a trailing one ",
    "def f(x):\n    return x ** 2  # naïve café\n",
    "日本語 と 한국어 🙂🇫🇷👩‍👩‍👧 ٣٤٥ ½ é e\u0301",
    "<|bos|>the cat<|eos|>\nsat <|no such token|>",
    TEXT,
]
TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}"


def write_tokenizer(path, write, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    write(writer)
    finish(writer)
    return path


def byte_level(path, pre, more=lambda writer: None):
    def write(writer):
        add_tokenizer(writer, byte_level_vocabulary(), pre=pre)
        more(writer)

    return build_tokenizer(GgufFile(write_tokenizer(path, write)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.gguf"


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_text_comes_back(path, pre):
    tokenizer = byte_level(path, pre)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        wanted = text.replace("e\u0301", "é") if pre in NFC else text
        assert tokenizer.decode(ids) == wanted


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_ids_are_those_of_transformers(path, pre):
    ours = byte_level(path, pre)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre == "smollm":  # transformers ignores that digits stand alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        own = theirs.backend_tokenizer.pre_tokenizer
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, own])
    for text in TEXTS:
        want = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == want


WORDS = {
    "gpt-2": [" they", "'ll", " pay", " 12345", "?!"],
    "smollm": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "llama-bpe": [" they", "'ll", " pay", " ", "123", "45", "?!"],
    "qwen2": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "tekken": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "smaug-bpe": [" they", "'ll", " pay", " ", "123", "45", "?!"],
    "gpt-4o": [" they'll", " pay", " ", "123", "45", "?!"],
    "glm4": [" they", "'ll", " pay", " ", "123", "45", "?!"],
    "stablelm2": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "command-r": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "deepseek-llm": [" they", "'", "ll", " pay", " ", "12345", "?!"],
    "deepseek-coder": [" they", "'", "ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
    "deepseek-v3": [" they", "'ll", " pay", " ", "123", "45", "?!"],
    "deepseek-r1-qwen": [" they", "'ll", " pay", " ", "1", "2", "3", "4", "5", "?!"],
}


@pytest.mark.parametrize("pre", list(WORDS))
def test_words(pre):
    found = PRE_TOKENIZERS[pre].pre_tokenize_str(" they'll pay 12345?!")
    assert [word.replace("Ġ", " ") for word, _ in found] == WORDS[pre]


# What sets each rule apart from its neighbours.
APART = {
    # ":-~" of its third pattern holds the ASCII letters, and cuts what the second left whole.
    "deepseek-llm": (
        "naïve 日本とA\n\nʰ",
        ["na", "ï", "ve", " ", "日本と", "A", "\n", "\n", "ʰ"],
    ),
    "deepseek-v3": ("e\u0301 日本とA (x)", ["e\u0301", " ", "日本と", "A", " (", "x", ")"]),
    "gpt-4o": ("helloWorld it'S a//\n", ["hello", "World", " it'S", " a", "//\n"]),
    "qwen35": ("ne\u0301e 12", ["ne\u0301e", " ", "1", "2"]),
    "seed-coder": ("a.\n\nb", ["a", ".", "\n\n", "b"]),
}


@pytest.mark.parametrize("pre", list(APART))
def test_words_that_set_rules_apart(pre):
    text, want = APART[pre]
    cuts = [cut for _, cut in PRE_TOKENIZERS[pre].pre_tokenize_str(text)]
    assert [text[begin:end] for begin, end in cuts] == want


def test_tekken_is_the_pattern_that_transformers_has_for_it():
    source = inspect.getsource(tokenization_utils_tokenizers)
    pattern = re.search(r'r"(.*\\p\{Lt\}.*)"', source)[1]
    theirs = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in (*TEXTS, "helloWorld ABCdef fooBAR éÀ 12a\u0301b", "a//b\n/c  \n d ǅx ʰʰA 日本A"):
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        want = pre_tokenizers.Sequence([theirs, bytes_of]).pre_tokenize_str(text)
        assert PRE_TOKENIZERS["tekken"].pre_tokenize_str(text) == want


def test_special_tokens_and_template(path):
    def more(writer):
        writer.add_chat_template(TEMPLATE)
        writer.add_eot_token_id(3)

    tokenizer = byte_level(path, "llama-bpe", more)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|bos|>", "<|eos|>")
    assert eos_ids(GgufFile(path)) == (eos, 3)
    ids = tokenizer("the cat").input_ids
    assert ids[0] == bos  # llama-bpe adds it where the file does not say
    assert tokenizer.decode([*ids, eos], skip_special_tokens=True) == "the cat"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|bos|>hi<|eos|>"
    without = byte_level(path, "llama-bpe", lambda writer: writer.add_add_bos_token(False))
    assert without("the cat").input_ids == ids[1:]


def sentence_piece(writer):
    """SentencePiece's: specials, bytes, pieces with scores."""
    pieces = ["▁", "h", "e", "l", "o", "ll", "he", "▁he", "llo", "▁hello", "lo"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, CONTROL, CONTROL] + [6] * 256 + [1] * len(pieces))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_sentence_piece(path):
    file = GgufFile(write_tokenizer(path, sentence_piece))
    tokenizer = build_tokenizer(file)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("hello hex").input_ids)
    assert tokens == ["<s>", "▁hello", "▁he", "<0x78>"]
    for text in ("hello hello", "  lo hello", "日本 hello 🙂\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:]


def test_refusals(path):
    def refuses(message):
        return pytest.raises(ModelFileError, match=message)

    with refuses(
        r"tokenizer.ggml.pre must be one of gpt-2, .*qwen2, .*got poro-chat; .*gguf_file="
    ):
        byte_level(path, "poro-chat")
    with refuses(r"tokenizer.ggml.model must be gpt2 or llama, got bert"):
        byte_level(
            path,
            "gpt-2",
            lambda w: w.kv_data[0]["tokenizer.ggml.model"].__setattr__("value", "bert"),
        )
    with refuses(r"metadata key tokenizer.ggml.tokens is missing"):
        build_tokenizer(GgufFile(write_tokenizer(path, lambda writer: None)))
    with refuses(r"damaged: tokenizer.ggml.merges"):
        byte_level(
            path,
            "gpt-2",
            lambda w: w.kv_data[0]["tokenizer.ggml.merges"].__setattr__("value", ["no such"]),
        )
