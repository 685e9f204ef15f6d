"""What followed the same few tokens earlier in a sequence that grows. No torch."""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """Where the n-grams of one sequence last stood, kept up as it grows.

    Args:
        shortest, longest: tokens of an n-gram, at least 1 and at least shortest.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        # By n-gram, where the token after its last place is; the sequence's own end has none.
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0  # leading tokens whose n-grams are in

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the last earlier place of the longest of the sequence's last n-grams.

        Args:
            tokens: those of the last call, unchanged, and more.
            count: tokens proposed; where what followed ends before, it goes on with itself.

        Returns:
            count tokens, or none where no n-gram has been there before.
        """
        self._grow(tokens)
        length = len(tokens)
        for size in self._sizes:
            if size < length and (begin := self._after.get(tuple(tokens[-size:]))) is not None:
                found: list[int] = []
                for at in range(begin, begin + count):
                    found.append(tokens[at] if at < length else found[at - length])
                return found
        return []

    def _grow(self, tokens: Sequence[int]) -> None:
        for end in range(max(self._known, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
