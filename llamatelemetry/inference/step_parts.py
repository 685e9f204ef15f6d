"""One forward over chunks of several kinds: what attention reads of each kind alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from llamatelemetry.inference.speculation_config import MAX_DRAFT
from llamatelemetry.inference.step import Chunk
from llamatelemetry.models.step_input import StepInput

# Tokens of a sequence at most, with which attention is one of few queries.
_FEW_QUERIES = MAX_DRAFT + 1


def part_by_kind(step: StepInput, chunks: Sequence[Chunk]) -> None:
    """Gives a StepInput its parts, where its chunks are of several kinds.

    Args:
        step: of these chunks.
        chunks: those of a kind best one after the other, for each run of a kind is a part: single
            tokens behind others, the few of a draft, longer ones behind others, whole sequences.
    """
    groups = [list(group) for _, group in groupby(chunks, key=_kind)]
    if len(groups) < 2:
        return
    parts, first, begin = [], 0, 0
    for group in groups:
        counts = [len(chunk.tokens) for chunk in group]
        last, end = first + len(group), begin + sum(counts)
        part = replace(
            step,
            positions=step.positions[begin:end],
            slot_mapping=step.slot_mapping[begin:end],
            block_table=step.block_table[first:last],
            cache_seqlens=step.cache_seqlens[first:last],
            cu_seqlens_q=step.cu_seqlens_q[first : last + 1] - begin,
            max_seqlen_q=max(counts),
            is_whole=_kind(group[0]) == "whole",
        )
        parts.append((begin, end, part))
        first, begin = last, end
    step.parts = parts


def _kind(chunk: Chunk) -> str:
    if chunk.begin == 0:
        return "whole"
    if len(chunk.tokens) == 1:
        return "single"
    return "few" if len(chunk.tokens) <= _FEW_QUERIES else "continued"
