"""Drafts for tests: what a request will draw, with every few tokens another one, or never right."""

from __future__ import annotations

from llamatelemetry.inference.ngrams import NgramIndex


def draft_from(monkeypatch, texts, wrong_each=3):
    """Has requests drafted from the text that is theirs, prompt and answer, of texts.

    Args:
        wrong_each: each so many-th token of a text is drafted wrongly; 1 drafts no right one.
    """

    def propose(self, tokens, count):
        for text in texts:
            if list(tokens) == text[: len(tokens)]:
                found = range(len(tokens), min(len(tokens) + count, len(text)))
                return [text[at] ^ (at % wrong_each == 0) for at in found]
        return [1] * count

    monkeypatch.setattr(NgramIndex, "propose", propose)
