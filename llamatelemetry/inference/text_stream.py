"""Token ids to text as they come: whole characters only, ending before a stop string."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT = 6  # tokens before a token that its text may depend on, such as the space of a word


class TextStream:
    """Decodes one sequence incrementally; holds back what may be the start of a stop string.

    The text is that of decoding all ids at once. Where tokens are bytes it is their UTF-8, with
    U+FFFD for what is none, which tokenizers' ByteFallback writes once for every byte of a run.

    Args:
        tokenizer: a transformers tokenizer
        stop_strings: the text ends before the first that appears; ``stopped`` is then True. A str
            is one stop string
        name: what refusals call stop_strings
        shown: names of control tokens that the text shows; of others it shows nothing

    Example:
        >>> text = TextStream(loaded.tokenizer, stop_strings="c")
        >>> [text.push(token) for token in loaded.tokenizer.encode("abcd")]
        ['a', 'b', '', '']
        >>> text.stopped
        True
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: str | Sequence[str] = (),
        name: str = "stop_strings",
        shown: Collection[str] = (),
    ) -> None:
        self.text = ""
        self.stopped = False
        self._stop_strings = stops(stop_strings, name)
        self._held = ""
        self._piece = _pieces_of(tokenizer)
        self._shown = {i: one for one in shown if (i := _id_of(tokenizer, one)) is not None}
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that token_id makes certain; "" while a character or a stop string is open."""
        piece = self._piece(token_id) or self._shown.get(token_id, "")
        if isinstance(piece, str):  # whole characters: what was open before them stays open
            piece = self._characters.decode(b"", final=bool(piece)) + piece
        else:
            piece = self._characters.decode(piece)
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back: for a stop string that did not come, and U+FFFD for a character that
        did not end."""
        return self._release(self._characters.decode(b"", final=True), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [i for stop in self._stop_strings if (i := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain = min(found)
        else:
            certain = len(self._held) - (0 if last else self._open_length())
        released, self._held = self._held[:certain], self._held[certain:]
        self.text += released
        return released

    def _open_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0


def stops(stop_strings: Any, name: str) -> tuple[str, ...]:
    """Stop strings as a tuple; a str is one of them.

    Raises:
        ValueError: for what is no string, and for an empty one.
    """
    if isinstance(stop_strings, str):
        stop_strings = (stop_strings,)
    if not isinstance(stop_strings, Iterable):
        raise ValueError(f"{name} must be strings, got {stop_strings!r}")
    found = list(stop_strings)
    if not all(isinstance(stop, str) for stop in found):
        raise ValueError(f"{name} must be strings, got {found!r}")
    if not all(found):
        raise ValueError(f"{name} must not hold an empty string, which stops everything")
    return tuple(found)


def _id_of(tokenizer: Any, name: str) -> int | None:
    """The id of a token that the tokenizer was given beside its vocabulary; None for no such."""
    found = tokenizer.get_added_vocab().get(name)
    return None if found is None else int(found)


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """A function from one token to its bytes, whatever stands beside it; of a control token to its
    name's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda token: str(tokenizer.decode([token])).encode()
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    is_bytes = _decoder_kinds(tokenizer) == {"ByteLevel"}

    def found(token: int) -> bytes:
        name = backend.id_to_token(token) or ""
        if token in special:
            return str(name).encode()
        if match := _BYTE.fullmatch(name):
            return bytes.fromhex(match[1])
        if is_bytes:
            return _bytes_of(name)
        first = str(backend.decode([token]))  # some decoders strip a first token's space
        return str(backend.decode([token, token]))[len(first) :].encode()

    return found


def _pieces_of(tokenizer: Any) -> Callable[[int], bytes | str]:
    """A function from the next token to its bytes, or to its text where it is no bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        special = set(tokenizer.all_special_ids)
        return _Differences(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), special)
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    kinds = _decoder_kinds(tokenizer)
    if kinds == {"ByteLevel"}:
        return lambda token: b"" if token in special else _bytes_of(backend.id_to_token(token))
    differences = _Differences(backend.decode, special)
    if "ByteFallback" not in kinds:
        return differences

    def piece(token: int) -> bytes | str:
        text = differences(token)
        match = _BYTE.fullmatch(backend.id_to_token(token) or "")
        return bytes.fromhex(match[1]) if match and token not in special else text

    return piece


class _Differences:
    """The text that each token adds to that of the few before it."""

    def __init__(self, decode: Callable[[list[int]], str], special: set[int]) -> None:
        self._decode, self._special = decode, special
        self._context: list[int] = []
        self._before = ""

    def __call__(self, token: int) -> str:
        if token in self._special:
            return ""
        after = self._decode([*self._context, token])
        shared = len(self._before)
        if not after.startswith(self._before):  # the token changed what the last ones mean
            pairs = zip(after, self._before, strict=False)
            shared = next((i for i, (new, old) in enumerate(pairs) if new != old), len(after))
        self._context = [*self._context, token][-_CONTEXT:]
        self._before = self._decode(self._context)
        return after[shared:]


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Types of the decoders that make a tokenizer's text."""
    state = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _bytes_of(token: str | None) -> bytes:
    """A token of a byte-level vocabulary as bytes; a character that stands for none is itself."""
    table, token = _byte_level(), token or ""
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


@lru_cache(1)
def _byte_level() -> dict[str, int]:
    """GPT-2's printable character for each byte, and back."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
