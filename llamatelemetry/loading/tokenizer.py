"""The tokenizer that a GGUF file's metadata describes, built with the tokenizers library."""

from __future__ import annotations

import math
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from llamatelemetry.loading.errors import in_one_sentence, sentence_of
from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.pre_tokenizers import ADD_BOS, NFC, PRE_TOKENIZERS, WHOLE_WORDS_FIRST

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
_NO_TOKEN = (-1, 2**32 - 1)  # what stands for none where a token's id is wanted
_SPARE = ("unknown", "padding")  # some files name ids for them that no token has; nothing needs it
_LONGEST_TOKEN = 4096  # characters; every cut of a token is looked up
_SPACE = "▁"  # what SentencePiece writes for a space


def build_tokenizer(file: GgufFile) -> Any:
    """A transformers PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises:
        ModelFileError: for a tokenizer model or pre-tokenizer without a row here
    """
    from transformers import PreTrainedTokenizerFast

    tokens = file.values("tokenizer.ggml.tokens", str)
    model = file.value("tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer = _sentence_piece(file, tokens)
    else:
        raise file.unserved(f"tokenizer.ggml.model must be gpt2 or llama, got {model}")
    types = _types(file, tokens)
    # Control tokens are hidden by skip_special_tokens, user-defined ones are text.
    added = {
        kind: [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, its_kind in zip(tokens, types, strict=True)
            if its_kind == kind
        ]
        for kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_special_tokens(added[_CONTROL])
    tokenizer.add_tokens(added[_USER_DEFINED])

    ids = special_ids(file)
    named = {f"{name}_token": tokens[i] for name, i in ids.items()}
    adds_bos = model == "llama" or _pre(file) in ADD_BOS
    add_bos = file.value("tokenizer.ggml.add_bos_token", bool, adds_bos)
    add_eos = file.value("tokenizer.ggml.add_eos_token", bool, False)
    template = file.value("tokenizer.chat_template", str, "")
    with in_one_sentence(file.path, "its tokenizer is none of transformers'"):
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=template or None,
            clean_up_tokenization_spaces=False,
            add_bos_token=add_bos and "bos" in ids,
            add_eos_token=add_eos and "eos" in ids,
            **named,
        )


def special_ids(file: GgufFile) -> dict[str, int]:
    """Ids of the bos, eos, unk and pad tokens, those that the file names.

    Raises:
        ModelFileError: for what is no token's id.
    """
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {short: _token_id(file, name) for short, name in names.items()}
    return {short: i for short, i in found.items() if i is not None}


def eos_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: end of sequence, of turn, of message.

    Raises:
        ModelFileError: for what is no token's id.
    """
    found = (_token_id(file, name) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _token_id(file: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    found: int = file.value(key, int)
    num_tokens = len(file.value("tokenizer.ggml.tokens", list))
    if found in _NO_TOKEN or (found >= num_tokens and name in _SPARE):
        return None
    if not 0 <= found < num_tokens:
        raise file.error(
            f"metadata key {key} must be one of the {num_tokens} tokens' ids, got {found}"
        )
    return found


def _types(file: GgufFile, tokens: list[str]) -> list[int]:
    """tokenizer.ggml.token_type; without one all tokens are plain ones."""
    types = file.values("tokenizer.ggml.token_type", int, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise file.error(
            f"metadata key tokenizer.ggml.token_type must have a value for each of the "
            f"{len(tokens)} tokens, got {len(types)}"
        )
    return types


def _pre(file: GgufFile) -> str:
    pre = file.value("tokenizer.ggml.pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise file.unserved(f"tokenizer.ggml.pre must be one of {known}, got {pre}")
    return pre


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """GPT-2's byte-pair encoding: bytes written as printable characters, merges in order."""
    pre = _pre(file)
    merges = [tuple(merge.split(" ")) for merge in file.values("tokenizer.ggml.merges", str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(file, vocabulary, merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece's byte-pair encoding: the merge with the better score first."""
    scores = file.values("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise file.error(
            f"metadata key tokenizer.ggml.scores must have a value for each of the {len(tokens)} "
            f"tokens, got {len(scores)}"
        )
    if any(math.isnan(score) for score in scores):
        raise file.error("metadata key tokenizer.ggml.scores must hold numbers, got a NaN")
    if (longest := max(map(len, tokens), default=0)) > _LONGEST_TOKEN:
        raise file.error(f"a token must have at most {_LONGEST_TOKEN} characters, got {longest}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for i, (token, kind) in enumerate(zip(tokens, _types(file, tokens), strict=True)):
        if kind == _CONTROL:
            continue  # no text is merged into one
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], -scores[left], -scores[right], left, right))
    merges = [(tokens[left], tokens[right]) for *_, left, right in sorted(ranked)]
    unknown = special_ids(file).get("unk")
    tokenizer = Tokenizer(
        _bpe(
            file,
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*back, *strip])
    return tokenizer


def _bpe(file: GgufFile, vocabulary: dict[str, int], merges: Any, **options: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # tokenizers raises plain Exception
        raise file.error(f"damaged: tokenizer.ggml.merges: {sentence_of(error)}") from None
