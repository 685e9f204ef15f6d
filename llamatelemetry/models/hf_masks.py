"""The mask of our attention under transformers: which slots of a cache hold tokens.

Transformers pads a batch left or right, and hands attention functions caches that are padded with
it and perhaps longer than what was seen. It asks a mask function once a forward what to make of
that; without one under the attention's name it would drop the padding silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

# Bits of a key mask's bytes, one byte for each slot of keys and values.
_TOKEN = 1  # holds a token, not padding
_QUERY = 2  # holds what this forward asks with


class PaddedLayout(NamedTuple):
    """How paged_attention reads a padded cache: twice, for queries that are tokens and for padding.

    A query that is padding sees the tokens before it, as with torch's attention: where a prompt is
    padded on the right, transformers takes the first new token from there.
    """

    slots: Tensor  # [batch, num_slots] the slots of each row that hold tokens, then the others
    cache_seqlens: Tensor  # [batch] int32, tokens in the cache
    cu_seqlens_q: Tensor  # [batch + 1] int32, of the queries that are tokens
    pad_seqlens: Tensor  # [batch] int32, tokens that padding sees
    cu_pads: Tensor  # [batch + 1] int32, of the queries that are padding
    order: Tensor  # [batch * seqlen_q] the queries that are tokens, then the others
    places: Tensor  # [batch * seqlen_q] its inverse
    num_tokens: int  # queries that are tokens
    pads_see: bool  # some padding comes after a token
    has_gap: bool  # padding between tokens: slots are further apart than positions
    uneven: bool  # of one row, padding sees different tokens


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What attention_forward needs of a mask: which slots hold tokens, and which hold queries.

    It has four dimensions, for transformers hands such masks on as they are, and its layout, which
    all layers share, as an attribute.

    Returns: None where every slot holds a token and the last ones are the queries;
             [1, 1, 1, 1] int32, where that many first slots of every row hold tokens;
             [batch_size, 1, 1, kv_length] uint8 where rows have padding;
             sdpa_mask's mask for anything but causal or sliding-window attention, and for padding
             while a graph is traced or captured
    """
    window = getattr(config, "sliding_window", None)
    causal = mask_function is causal_mask_function if local_size is None else local_size == window
    if attention_mask is not None and not is_tracing(attention_mask) and attention_mask.all():
        attention_mask = None
    # A mask that may not be skipped has more in it than causality, unless it is a static decode's.
    special = use_vmap or not causal or not (allow_is_causal_skip or q_length == 1)
    if special or (attention_mask is not None and is_tracing(attention_mask)):
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    seen = q_offset + q_length - kv_offset
    if attention_mask is None:
        if isinstance(seen, Tensor):
            return seen.int().view(1, 1, 1, 1)
        return None if seen == kv_length else torch.full((1, 1, 1, 1), seen, device=device).int()
    padding: Any = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    slots = torch.arange(kv_length, device=device)
    tokens = padding[:, kv_offset : kv_offset + kv_length] & (slots < seen)
    queries = (slots >= seen - q_length) & (slots < seen)
    mask = (tokens * _TOKEN + queries * _QUERY).to(torch.uint8)[:, None, None]
    mask.padded_layout = padded_layout(mask, batch_size, q_length)
    return mask


def padded_layout(mask: Tensor, batch: int, seqlen_q: int) -> PaddedLayout:
    """The layout of key_mask's mask; waits for the device once."""
    bits = mask[:, 0, 0].expand(batch, -1)
    tokens = (bits & _TOKEN).bool()
    first_query = (bits[0] & _QUERY).argmax()
    queries = first_query + torch.arange(seqlen_q, device=mask.device)
    is_token = tokens.index_select(1, queries)
    seen = tokens.cumsum(1).index_select(1, queries)
    most = seen.masked_fill(is_token, 0).amax(1)
    least = seen.masked_fill(is_token, tokens.shape[1]).amin(1)
    runs = tokens[:, 0] + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    order = is_token.logical_not().flatten().sort(stable=True).indices
    num_tokens, pads_see, has_gap, uneven = torch.stack(
        [is_token.sum(), most.amax(), (runs > 1).sum(), (most > least).sum()]
    ).tolist()
    return PaddedLayout(
        slots=tokens.logical_not().sort(dim=1, stable=True).indices,
        cache_seqlens=tokens.sum(1, dtype=torch.int32),
        cu_seqlens_q=_starts(is_token.sum(1)),
        pad_seqlens=most.int(),
        cu_pads=_starts(is_token.logical_not().sum(1)),
        order=order,
        places=order.argsort(),
        num_tokens=num_tokens,
        pads_see=pads_see > 0,
        has_gap=has_gap > 0,
        uneven=uneven > 0,
    )


def _starts(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def dense_mask(
    mask: Tensor | None, seqlen_q: int, seqlen_k: int, window: int | None, device: torch.device
) -> Tensor:
    """Which key each query sees, [batch or 1, 1, seqlen_q, seqlen_k] bool, of key_mask's mask."""
    slots = torch.arange(seqlen_k, device=device)
    if mask is not None and mask.dtype == torch.uint8:
        tokens = (mask & _TOKEN).bool()
        first_query = (mask[0, 0, 0] & _QUERY).argmax()
    else:
        num_tokens = slots.new_tensor(seqlen_k) if mask is None else mask.view(())
        tokens = slots < num_tokens
        first_query = num_tokens - seqlen_q
    queries = (first_query + torch.arange(seqlen_q, device=device)).unsqueeze(1)
    seen = slots <= queries
    if window is not None:
        seen = seen & (slots > queries - window)
    return (
        (seen & tokens).expand(-1, 1, -1, -1) if tokens.ndim == 4 else (seen & tokens)[None, None]
    )
