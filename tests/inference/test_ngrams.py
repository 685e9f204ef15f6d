"""What followed the same n-gram before: as a search through the whole text finds it."""

from __future__ import annotations

import random

from llamatelemetry.inference.ngrams import NgramIndex


def searched(tokens, shortest, longest, count):
    """The text goes on with itself where what followed ends."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[-size:]:
                found = []
                for at in range(begin + size, begin + size + count):
                    found.append((tokens + found)[at])
                return found
    return []


def test_it_finds_what_a_search_finds():
    rng = random.Random(3)
    for shortest, longest in ((1, 1), (1, 3), (2, 4)):
        index, tokens, hits = NgramIndex(shortest, longest), [], 0
        for _ in range(120):
            tokens += [rng.randrange(4) for _ in range(rng.choice([1, 1, 3]))]
            count = rng.randrange(1, 6)
            found = index.propose(tokens, count)
            assert found == searched(tokens, shortest, longest, count)
            hits += bool(found)
        assert hits > 90


def test_a_text_that_repeats_itself_goes_on():
    assert NgramIndex(1, 3).propose([7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]
    assert NgramIndex(1, 3).propose([7], 5) == []
    assert NgramIndex(2, 3).propose([7, 8, 9, 8], 5) == []
