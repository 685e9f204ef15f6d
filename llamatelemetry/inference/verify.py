"""One forward over the last tokens of requests and what was drafted after them, and what of it is
right.

The token after each place is drawn from the target's own logits, with the same random bits as
without a draft, and a drafted token is kept where it is that token. So a request's tokens are those
that it would have drawn one by one, but for near-ties that the rounding of other shapes decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.decode_rows import chunk_of
from llamatelemetry.inference.drawing import Asked, Drawn, draw, of_piece
from llamatelemetry.inference.launched import Result
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, nan_error, sampling_tensors
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import Chunk, put
from llamatelemetry.inference.verify_step import VerifyStep

MAX_VERIFY_STEPS = 16  # that are kept, one for each number of rows and of tokens
# Tokens of a step, rounded up to a multiple: of rows on a GPU, to which a few more cost little.
TOKENS_MULTIPLE = {"cpu": 4, "cuda": 8}
_FEW_TOKENS = 8  # up to so many there is a step for each number on the CPU


class Verifier:
    """Runs the rows of a plan that has drafts.

    Args:
        runner: whose cache the rows are in.
        asked_of: how a request's tokens are to be drawn.
        is_watched: of a piece, whether the host draws its tokens.
        buckets: numbers of rows that a step may have.
        longest: drafted tokens of a row at most.

    Attributes:
        was_typical: whether the last run took what its step takes; the first, which records or
            captures it, takes longer, and so does one that failed.
        right: of the last run's requests whose drafts were checked so far, how many tokens of them
            the model drew too.
    """

    def __init__(
        self,
        runner: StepRunner,
        asked_of: Callable[[ScheduledRequest], Asked],
        is_watched: Callable[[Piece], bool],
        buckets: Sequence[int],
        longest: int,
    ) -> None:
        self._runner, self._asked_of, self._is_watched = runner, asked_of, is_watched
        self._buckets, self._longest = buckets, longest + 1
        self.was_typical = False
        self.right: dict[ScheduledRequest, int] = {}

    def run(self, pieces: Sequence[Piece], width: int) -> VerifyStep:
        """Runs the step of these pieces, tables of width blocks."""
        self.was_typical, self.right = False, {}
        rows = next(size for size in self._buckets if size >= len(pieces))
        spare = rows - len(pieces)
        chunks = [_chunk_of(piece) for piece in pieces]
        chunks += [Chunk([0], 0, pieces[0].table[:1])] * spare
        params = [self._asked_of(piece.request).params for piece in pieces] + [GREEDY] * spare
        offsets = [piece.request.num_drawn for piece in pieces] + [0] * spare
        count = self._num_tokens(rows, sum(len(chunk.tokens) for chunk in chunks))

        def load() -> VerifyStep:
            step = self._runner.step_of(VerifyStep, rows, width, count, self._longest)
            step.place(chunks, params, offsets, len(pieces))
            self.was_typical = step.has_run
            return step

        with torch.autocast(self._runner.pages.device.type, enabled=False):  # the cache's dtype
            step, _ = self._runner.draw(load)
        return step

    def run_beside(
        self, pieces: Sequence[Piece], prompts: Sequence[Piece], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward over pieces with drafts and pieces of prompts, which reads the weights once.

        Returns:
            The tokens drawn after each token of the first, [num_tokens] int64, -1 where logits are
            NaN; their logits, [num_tokens, vocab_size]; those after each prompt, [len(prompts),
            vocab_size].
        """
        self.was_typical, self.right = False, {}
        chunks, device = [_chunk_of(piece) for piece in pieces], self._runner.pages.device
        count, ends = sum(len(chunk.tokens) for chunk in chunks), list[int]()
        beside = [chunk_of(piece) for piece in prompts]
        for chunk in beside:
            ends.append((ends[-1] + 1 if ends else count) + len(chunk.tokens) - 1)
        kept = [*range(count), *ends]
        with torch.autocast(device.type, enabled=False):  # the cache's dtype
            logits = self._runner.prefill([*chunks, *beside], width, kept, in_parts=True)
            own = logits[:count]
            places = [(piece, i) for piece in pieces for i in range(1 + len(piece.draft))]
            params = [self._asked_of(piece.request).params for piece, _ in places]
            offsets = [piece.request.num_drawn + i for piece, i in places]
            sampling = sampling_tensors(params, device)
            drawn = sampling.sample(own, put(offsets, torch.int64, device))
            return drawn.masked_fill(own.isnan().any(-1), -1), own, logits[count:]

    def _num_tokens(self, rows: int, least: int) -> int:
        device = self._runner.pages.device.type
        multiple = TOKENS_MULTIPLE.get(device, TOKENS_MULTIPLE["cuda"])
        if device == "cpu" and least <= _FEW_TOKENS:
            return least
        if device != "cpu":
            multiple = max(multiple, rows)
        return -(-least // multiple) * multiple

    def results(self, pieces: Sequence[Piece], drawn: Tensor, logits: Tensor) -> Iterator[Result]:
        """What each piece has drawn, token by token: a part of the piece with one token, as steps
        without drafts would give it. The caller has taken a result when it asks for the next.

        Args:
            pieces: that a forward ran on.
            drawn: the tokens after each of theirs, -1 for NaN; whatever follows.
            logits: [num_tokens, vocab_size] from which they were drawn.
        """
        tokens, watched, begin = drawn.tolist(), [], 0
        for piece in pieces:
            if self._is_watched(piece):
                watched.append((piece, begin))
            else:
                yield from self._unwatched(piece, tokens[begin : begin + 1 + len(piece.draft)])
            begin += 1 + len(piece.draft)
        yield from self._watched(watched, logits)

    def _unwatched(self, piece: Piece, tokens: Sequence[int]) -> Iterator[Result]:
        for index, token in enumerate(tokens):
            if token < 0:
                yield _part(piece, index), nan_error(self._runner.pages.model_dtype)
            else:
                self._count(piece, index, token)
                yield _part(piece, index), [Drawn(token)]
            if not _is_right(piece, index):
                return

    def _watched(self, rows: Sequence[tuple[Piece, int]], logits: Tensor) -> Iterator[Result]:
        """Draws the tokens of all rows at one place after the other, each from what the tokens
        before it leave of penalties, grammar and the like."""
        index, device = 0, self._runner.pages.device
        while rows:
            requests = [piece.request for piece, _ in rows]
            places = put([begin + index for _, begin in rows], torch.int64, device)
            with torch.autocast(device.type, enabled=False):
                asked = [self._asked_of(one) for one in requests]
                drawn = draw(logits.index_select(0, places), requests, asked)
            for (piece, _), one in zip(rows, drawn, strict=True):
                if isinstance(one, Drawn):
                    self._count(piece, index, one.token)
                yield _part(piece, index), of_piece([one])
            rows = [(piece, begin) for piece, begin in rows if _is_right(piece, index)]
            index += 1

    def _count(self, piece: Piece, index: int, token: int) -> None:
        """Counts before the token is taken: other threads may look at the request once it ends."""
        request = piece.request
        if index == 0 and piece.draft:
            request.num_drafted += len(piece.draft)
            self.right[request] = 0
        if index < len(piece.draft) and token == piece.draft[index]:
            request.num_accepted += 1
            self.right[request] += 1


def _chunk_of(piece: Piece) -> Chunk:
    """Its tokens and its draft for a forward."""
    tokens = piece.request.tokens[piece.begin : piece.end]
    return Chunk([*tokens, *piece.draft], piece.begin, piece.table)


def _part(piece: Piece, index: int) -> Piece:
    """The token before the one that is drawn at an index, the first being the piece's own."""
    end = piece.end + index
    return Piece(piece.request, piece.begin if index == 0 else end - 1, end, piece.table, True)


def _is_right(piece: Piece, index: int) -> bool:
    """Whether what was drawn at an index, and taken, is what was drafted there, and the request
    goes on."""
    request = piece.request
    return (
        request.finish_reason is None
        and index < len(piece.draft)
        and request.tokens[-1] == piece.draft[index]
    )
