"""Log-probabilities of tokens, in the shapes that chats and completions have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from llamatelemetry.inference.drawing import TokenLogprobs
from llamatelemetry.inference.text_stream import token_bytes


class TokenNames:
    """The text of single tokens.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._bytes: Callable[[int], bytes] = token_bytes(tokenizer)

    def text(self, token: int) -> str:
        """With U+FFFD where the token is a part of a character."""
        return self._bytes(token).decode(errors="replace")

    def chat(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The logprobs of a chat's choice."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._bytes(token)
            return {
                "token": text.decode(errors="replace"),
                "logprob": logprob,
                "bytes": list(text),
            }

        content = [
            entry(token, one.logprob) | {"top_logprobs": [entry(*best) for best in one.top]}
            for token, one in zip(tokens, found, strict=True)
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, tokens: Sequence[int], found: Sequence[TokenLogprobs], offset: int
    ) -> dict[str, Any]:
        """The logprobs of a completion's choice; offset is where its first token's text begins."""
        texts = [self.text(token) for token in tokens]
        offsets = list(accumulate(map(len, texts[:-1]), initial=offset))
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [
                {self.text(token): logprob for token, logprob in one.top} for one in found
            ],
            "text_offset": offsets,
        }
