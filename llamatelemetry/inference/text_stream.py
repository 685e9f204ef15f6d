"""Token ids to text as they come: whole characters only, ending before a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes one sequence incrementally; holds back what may be the start of a stop string.

    Args:
        tokenizer: a transformers fast tokenizer
        stop_strings: the text ends before the first that appears; ``stopped`` is then True. A str
            is one stop string
        name: what refusals call stop_strings

    Example:
        >>> text = TextStream(loaded.tokenizer, stop_strings="c")
        >>> [text.push(token) for token in loaded.tokenizer.encode("abcd")]
        ['a', 'b', '', '']
        >>> text.stopped
        True
    """

    def __init__(
        self, tokenizer: Any, stop_strings: str | Sequence[str] = (), name: str = "stop_strings"
    ) -> None:
        if isinstance(stop_strings, str):
            stop_strings = (stop_strings,)
        if not isinstance(stop_strings, Iterable) or not all(
            isinstance(stop, str) for stop in stop_strings
        ):
            raise ValueError(f"{name} must be strings, got {stop_strings!r}")
        if any(not stop for stop in stop_strings):
            raise ValueError(f"{name} must not hold an empty string, which stops everything")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that token_id makes certain; "" while a character or a stop string is open."""
        return self._release(self._decoder.step(self._tokenizer, token_id) or "", last=False)

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return self._release("", last=True)

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
