"""Which key each query of a forward sees, as rules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeyLayout(NamedTuple):
    """Which key each query of a forward sees; query i stands at slot ``start + i``.

    Attributes:
        batch, seqlen_q, seqlen_k: the shape of the mask it stands for
        start: the slot of the first query
        causal: no query sees a slot after its own
        left, right: a query sees at most so many slots before and after its own; -1: unlimited
        tokens: [batch, seqlen_k] bool, the slots that hold tokens and not padding; None: all of
            them
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    start: int | Tensor
    causal: bool
    left: int
    right: int
    tokens: Tensor | None

    @property
    def one_set(self) -> bool:
        """Whether all queries of a row see the same keys."""
        return self.seqlen_q == 1 or not (self.causal or self.left >= 0 or self.right >= 0)

    @property
    def is_plain_causal(self) -> bool:
        """Whether it is what scaled_dot_product_attention calls is_causal."""
        return (
            self.causal
            and self.left < 0
            and self.right < 0
            and self.tokens is None
            and not isinstance(self.start, Tensor)
            and self.start == 0
            and self.seqlen_q == self.seqlen_k
        )

    def dense(self, device: torch.device | str) -> Tensor:
        """The matrix of it, [batch, 1, seqlen_q, seqlen_k] bool, as sdpa_mask gives."""
        slots = torch.arange(self.seqlen_k, device=device)
        queries = (torch.arange(self.seqlen_q, device=device) + self.start).unsqueeze(1)
        seen = slots <= queries if self.causal else (slots >= 0)[None]
        if self.left >= 0:
            seen = seen & (slots >= queries - self.left)
        if self.right >= 0:
            seen = seen & (slots <= queries + self.right)
        if self.tokens is not None:
            seen = seen & self.tokens[:, None, None]
        return seen.expand(self.batch, 1, self.seqlen_q, self.seqlen_k)
