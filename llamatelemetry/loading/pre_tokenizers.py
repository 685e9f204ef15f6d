"""tokenizer.ggml.pre: how text falls into the words that byte-pair merges stay inside."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_HEAD = r"[^\r\n\p{L}\p{N}]?"  # one character that a word may begin with
_WORDS = rf"{_HEAD}\p{{L}}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, what it matches and what is between; then bytes."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, last])


_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_LLAMA3 = _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_QWEN2 = _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}")
_QWEN35 = _split(
    rf"{_CONTRACTIONS}|{_HEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED = _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}")

# Words end where an upper-case letter follows a lower-case one.
_UPPER, _LOWER, _EITHER = r"\p{Lu}\p{Lt}", r"\p{Ll}", r"\p{Lm}\p{Lo}\p{M}"
_CASED = [
    rf"{_HEAD}[{_UPPER}{_EITHER}]*[{_LOWER}{_EITHER}]+",
    rf"{_HEAD}[{_UPPER}{_EITHER}]+[{_LOWER}{_EITHER}]*",
]
_PATHS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = _split(rf"{'|'.join(_CASED)}|\p{{N}}|{_PATHS}")
_GPT4O = _split(
    rf"{'|'.join(f'{words}{_CONTRACTIONS}?' for words in _CASED)}|\p{{N}}{{1,3}}|{_PATHS}"
)

# DeepSeek's: one kind of character after the other.
_ASIAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_LLM = _split(
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    _ASIAN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")
_DEEPSEEK_V3 = _split(
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)

_LIKE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2")
PRE_TOKENIZERS = {
    **dict.fromkeys(
        ("gpt-2", "default", "exaone4", "jais", "mpt", "olmo", "phi-2", "trillion"), _GPT2
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _SINGLE_DIGITS,
    ),
    **dict.fromkeys((*_LIKE_LLAMA3, "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    "qwen35": _QWEN35,
    "seed-coder": _SEED,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
}
# of those, what differs where the metadata does not say
ADD_BOS = {*_LIKE_LLAMA3, "tekken"}
# a word of the vocabulary is never merged from parts
WHOLE_WORDS_FIRST = {*_LIKE_LLAMA3, "tekken"}
NFC = {"qwen2", "command-r"}
