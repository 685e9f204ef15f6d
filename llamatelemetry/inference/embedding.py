"""Texts as vectors: what a decoder's last layer makes of them, pooled over their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from llamatelemetry.models.forked import note_step

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


class Embedder:
    """Vectors of token ids by a transformers decoder, patched or not. Not thread-safe.

    Args:
        model: a causal decoder.
        pooling: "mean" of the last layer's rows, or the one of the "last" token.

    Raises:
        ValueError: for another pooling.
    """

    def __init__(self, model: Any, pooling: Pooling = "mean") -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.model, self.pooling = model, pooling

    @property
    def size(self) -> int:
        """Of a vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.inference_mode()
    def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector of length 1 for each row of token ids, computed in one forward.

        Rows are padded on the right, where no token that counts looks: the model is causal.

        Args:
            rows: at least one, each of at least one token.

        Returns:
            [len(rows)][size], float32 numbers.

        Raises:
            FloatingPointError: the model gives NaN.
        """
        note_step()
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=self.model.device)
        out = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
        vectors = self._pooled(out.last_hidden_state, lengths)
        if bool(vectors.isnan().any()):
            raise FloatingPointError("the model gives NaN for this input: it has no embedding")
        return torch.nn.functional.normalize(vectors, dim=-1).tolist()

    def _pooled(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """
        Args:
            hidden: [batch, seqlen, size].
            lengths: [batch], the others are padding.

        Returns:
            [batch, size] float32.
        """
        places = torch.arange(hidden.shape[1], device=hidden.device)
        if self.pooling == "last":
            return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1].float()
        is_token = (places < lengths[:, None]).unsqueeze(-1)
        # Not a product with 0, which a NaN or an infinity in the padding would survive.
        return torch.where(is_token, hidden.float(), 0.0).sum(1) / lengths[:, None]


def groups(rows: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Places of rows that go through the model together, padding counted: those of like lengths.

    Args:
        rows: any.
        max_tokens: of a group, unless one row alone is longer.
    """
    group: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):  # the longest of a group last
        if group and (len(group) + 1) * len(rows[i]) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
