"""Does a model of a class without a row give what it gave, as a whole?

A row's class is proved by the tests; of any other the probe has seen the parts alone, and what
stands between them (factors, more inputs, another head) shows in no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.decoder import Decoder, decoder_of, rope_tables
from llamatelemetry.models.huge_pages import use_huge_pages
from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.probe_setting import undisturbed
from llamatelemetry.models.stack import Stack
from llamatelemetry.models.step_input import DecoderState, StepInput

_BEGINS = (0, 6, 7, 9)  # of the packed steps: a prompt, one token, then several
_PAGE_SIZE = 16
# How far apart two ways through one model may come, of the outputs' size: far below what another
# factor or a part left out gives, and above the roundings of deep models.
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_LIMIT = 0.1


class WholeProbe:
    """What a stack gives before it is patched, and whether it still does.

    Raises:
        ValueError: a stack that does not run on token ids alone.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._ids = self._tokens()
        try:
            self._before = self._hidden()
        except Exception as error:  # of whatever the model is made of
            raise ValueError(
                f"a model of a class without a row must run on token ids, to be compared, got "
                f"{type(error).__name__}: {error}"
            ) from error

    @classmethod
    def of_patched(cls, model: Any) -> str | None:
        """Why a patched model's packed forward is not the model's; None if it is."""
        decoder = model._llamatelemetry.decoder
        return cls(decoder.stack).packed_disagreement(decoder)

    def disagreement(self) -> str | None:
        """Why the patched stack is not what it was; None if it is."""
        return _disagreement(self._hidden(), self._before)

    def packed_disagreement(self, decoder: Decoder) -> str | None:
        """Why the packed forward is not the model's; None if it is."""
        model = decoder.model
        try:
            with undisturbed(model):
                logits = model(input_ids=self._ids, use_cache=False).logits[0]
        except Exception as error:  # of whatever the model is made of
            return f"it does not run on token ids alone: {type(error).__name__}: {error}"
        ours = _packed(decoder, self._ids[0])
        return _disagreement(ours, logits[[end - 1 for end in _BEGINS[1:]]])

    def _hidden(self) -> Tensor:
        with undisturbed(self.stack.module):
            out = self.stack.module(input_ids=self._ids, use_cache=False)
        return out[0]  # hidden states, or the logits of a stack that is a whole model

    def _tokens(self) -> Tensor:
        size, device = self.stack.embedding.num_embeddings, self.stack.like().device
        return (torch.arange(_BEGINS[-1], device=device) * 7919 + 11).remainder(size).unsqueeze(0)


def whole_decoder(
    model: Any, stack: Stack, ops: OpSet, pieces: Mapping[str, Piece], whole: WholeProbe | None
) -> tuple[Decoder | None, str | None]:
    """The packed forward of a patched model, or why it has none; whole holds it to the model's.

    The weights of one on the CPU go to huge pages: the pieces have merged theirs by now.
    """
    decoder, reason = decoder_of(model, stack, ops, pieces)
    if decoder is not None and whole is not None:
        reason = whole.packed_disagreement(decoder)
    if reason is not None:
        return None, reason
    use_huge_pages((*model.parameters(), *model.buffers()))
    return decoder, None


def _disagreement(ours: Tensor, theirs: Tensor) -> str | None:
    distance = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    limit = _LIMITS.get(theirs.dtype, _HALF_LIMIT)
    if distance <= limit:
        return None
    return f"as a whole it errs by {distance:.3g} of what the model gives, more than {limit:g}"


def _packed(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits after each step, [steps, vocab_size]."""
    like, device = decoder.stack.like(), ids.device
    caches = []
    for block in decoder.blocks:
        shape = (1, _PAGE_SIZE, block.attention.num_heads_kv, block.attention.head_dim)
        caches.append((like.new_zeros(shape), like.new_zeros(shape)))
    state = DecoderState(caches, rope_tables(decoder.model, _BEGINS[-1], decoder.stack))
    rows = []
    for begin, end in itertools.pairwise(_BEGINS):
        positions = torch.arange(begin, end, device=device)
        step = StepInput(
            positions=positions,
            slot_mapping=positions,
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
            cache_seqlens=torch.full((1,), end, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32).to(device),
            max_seqlen_q=end - begin,
            is_whole=begin == 0,
        )
        rows.append(decoder.forward(ids[begin:end], step, state))
    return torch.cat(rows)
