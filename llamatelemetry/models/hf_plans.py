"""How paged_attention reads a padded cache: tables, lengths, and which queries go where.

A window counts slots, and a table leaves padding out, so that a window is exact where a row's
tokens are neighbours. A query that is padding sees the tokens before it, as with torch's attention:
where a prompt is padded on the right, transformers takes the first new token from there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llamatelemetry.models.hf_layout import KeyLayout


class SharedPlan(NamedTuple):
    """All queries of a row see the same keys.

    Attributes:
        slots: [batch, seqlen_k] the slots they see, then the others; None: the first ones of the
            row
        lengths: [batch] int32, how many they are
    """

    slots: Tensor | None
    lengths: Tensor


class PaddedPlan(NamedTuple):
    """Two calls, for the queries that are tokens and for those that are padding.

    Attributes:
        slots: [batch, seqlen_k] the slots of each row that hold tokens, then the others; None:
            tokens come first in every row
        lengths: [batch] int32, tokens in the cache
        cu_seqlens_q: [batch + 1] int32, of the queries that are tokens
        order, places: [batch * seqlen_q] the queries that are tokens, then the others; its inverse
        num_tokens: how many those are; None where only the device knows, and then is_token [batch *
            seqlen_q] chooses between the results of both calls
        pads: how the queries that are padding are read; None: they see no key
    """

    slots: Tensor | None
    lengths: Tensor
    cu_seqlens_q: Tensor
    order: Tensor
    places: Tensor
    num_tokens: int | None
    is_token: Tensor
    pads: PadRows | PadRanges | None


class PadRows(NamedTuple):
    """Padding queries of a row see the same first tokens of it.

    Attributes:
        lengths: [batch] int32, how many; cu_seqlens_q: [batch + 1] int32
        order, places: the queries that are padding, then the others, and its inverse; used where
            num_tokens is unknown
    """

    lengths: Tensor
    cu_seqlens_q: Tensor
    order: Tensor
    places: Tensor


class PadRanges(NamedTuple):
    """Each padding query sees a range of slots of its own.

    Attributes:
        rows: [pads] its row; slots: [pads, most]; lengths: [pads] int32; cu_seqlens_q: [pads + 1]
            int32
    """

    rows: Tensor
    slots: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor


Plan = SharedPlan | PaddedPlan | None


def plan_of_layout(layout: KeyLayout, device: torch.device, traced: bool) -> Plan:
    """The plan of a KeyLayout, or None where it has none; waits for the device unless traced.

    Layouts without padding need no plan: None for them too.
    """
    tokens = layout.tokens
    if tokens is None:
        return None
    if layout.one_set:
        seen = layout.dense(device)[:, 0, 0]
        ahead = seen.cumprod(1).sum(1) == seen.sum(1)
        first = not traced and bool(ahead.all())
        return SharedPlan(None if first else _front(seen), seen.sum(1, dtype=torch.int32))
    windowed = layout.left >= 0 or layout.right >= 0
    if windowed and traced:
        return None
    seqlen_q, seqlen_k = layout.seqlen_q, layout.seqlen_k
    queries = torch.arange(seqlen_q, device=device) + layout.start
    if not layout.causal and (isinstance(layout.start, Tensor) or seqlen_q != seqlen_k):
        return None  # the last tokens need not be the queries
    tokens = tokens & (torch.arange(seqlen_k, device=device) <= queries[-1])
    is_token = tokens.index_select(1, queries)
    seen = tokens.cumsum(1).index_select(1, queries)
    most = seen.masked_fill(is_token, 0).amax(1)
    least = seen.masked_fill(is_token, seqlen_k).amin(1)
    order = is_token.logical_not().flatten().sort(stable=True).indices
    pad_order = is_token.flatten().sort(stable=True).indices
    pads: PadRows | PadRanges | None = PadRows(
        most.int(), _starts(is_token.logical_not().sum(1)), pad_order, pad_order.argsort()
    )
    first, num_tokens = False, None
    if not traced:
        runs = tokens[:, 0] + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
        facts = (
            is_token.sum(),
            most.amax(),
            (runs > 1).sum(),
            (most > least).sum(),
            (tokens.cumprod(1).sum(1) < tokens.sum(1)).sum(),
        )
        num_tokens, pads_see, gaps, uneven, later = torch.stack(facts).tolist()
        first = not later
        if (windowed and gaps) or (uneven and not windowed):
            return None
        if windowed:
            pads = _pad_ranges(layout, tokens, is_token, queries)
        elif not pads_see:
            pads = None
    return PaddedPlan(
        slots=None if first else _front(tokens),
        lengths=tokens.sum(1, dtype=torch.int32),
        cu_seqlens_q=_starts(is_token.sum(1)),
        order=order,
        places=order.argsort(),
        num_tokens=num_tokens,
        is_token=is_token.flatten(),
        pads=pads,
    )


def _pad_ranges(
    layout: KeyLayout, tokens: Tensor, is_token: Tensor, queries: Tensor
) -> PadRanges | None:
    """The slots that padding sees in a window, where the tokens of a row are neighbours."""
    rows, index = is_token.logical_not().nonzero(as_tuple=True)
    if not rows.numel():
        return None
    first, slots = tokens.int().argmax(1)[rows], queries[index]
    end = first + tokens.sum(1)[rows]
    if layout.left >= 0:
        first = torch.maximum(first, slots - layout.left)
    if layout.causal or layout.right >= 0:
        end = torch.minimum(end, slots + 1 + (0 if layout.causal else layout.right))
    lengths = (end - first).clamp(min=0)
    most = int(lengths.max())
    if most == 0:
        return None
    table = (first[:, None] + torch.arange(most, device=tokens.device)).clamp(
        min=0, max=layout.seqlen_k - 1
    )
    ones = torch.ones_like(lengths)
    return PadRanges(rows, table, lengths.int(), _starts(ones))


def _front(seen: Tensor) -> Tensor:
    """The slots that are seen, then the others, each in order."""
    return seen.logical_not().sort(dim=1, stable=True).indices


def _starts(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
