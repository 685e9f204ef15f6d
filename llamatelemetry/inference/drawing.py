"""Tokens from logits that are looked at first: penalties, biases, grammars, log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llamatelemetry.inference.logit_options import NO_OPTIONS, LogitOptions, Matcher
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.sampling import SamplingParams, nan_error, sampling_tensors
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import put
from llamatelemetry.ops import apply_token_bitmask_


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable a drawn token was, and which were the most probable ones.

    Attributes:
        logprob: natural logarithm of its probability in the model's own distribution
        top: (token id, logprob) of the most probable tokens, the best first

    Example:
        >>> TokenLogprobs(-0.5, ((3, -0.5), (9, -1.25))).top[1]
        (9, -1.25)
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Drawn(NamedTuple):
    """A token, and its log-probabilities where the request asks for them."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Asked:
    """How a request's tokens are to be drawn.

    Attributes:
        params: SamplingParams.
        options: LogitOptions.
        matcher: where its text stands in options.grammar; None for none.
        num_candidates: of a beam, how many of the most probable tokens are told of; else 0.
    """

    params: SamplingParams
    options: LogitOptions = NO_OPTIONS
    matcher: Matcher | None = None
    num_candidates: int = 0

    @property
    def num_told(self) -> int | None:
        """Of how many tokens at each place the log-probability is told; None of none."""
        return self.num_candidates or self.options.logprobs

    @cached_property
    def needs_logits(self) -> bool:
        is_told = self.num_told is not None
        return is_told or self.options.needs_logits or self.params.repetition_penalty != 1


def draw(
    logits: Tensor, requests: Sequence[ScheduledRequest], asked: Sequence[Asked]
) -> list[Drawn | Exception]:
    """Draws one token a row, or says why the row has none: no row's error is another's.

    Args:
        logits: [rows, vocab_size], the caller's to lose.
        requests: of each row; a row's draw depends on its seed and on how many it has drawn.
        asked: likewise.

    Returns:
        For each row what was drawn; or FloatingPointError where a logit is NaN, ValueError where
        nothing may be drawn, and what its grammar or its penalties raised.
    """
    failed: dict[int, Exception] = {
        i: nan_error(logits.dtype) for i in logits.isnan().any(-1).nonzero().flatten().tolist()
    }
    told = [i for i, one in enumerate(asked) if one.num_told is not None]
    raw = torch.log_softmax(logits[told].float(), dim=-1) if told else None
    shaped = [
        i
        for i, (request, one) in enumerate(zip(requests, asked, strict=True))
        if request.forbidden or one.params.repetition_penalty != 1 or one.options.shapes_logits
    ]
    if shaped:
        logits = logits.float()
        for i in shaped:
            try:
                _shape_(logits[i], requests[i], asked[i])
            except Exception as error:
                failed[i] = error
        failed |= _mask_(logits, asked)
        dead = (logits[shaped].amax(-1) == -torch.inf).nonzero().flatten().tolist()
        for i in (shaped[at] for at in dead):
            failed.setdefault(
                i,
                ValueError(
                    "a token must be left that may be drawn: the grammar, min_tokens and "
                    "logit_bias together forbid all"
                ),
            )
    if failed:
        logits = logits.index_fill(0, _ids(list(failed), logits), 0.0)  # something to draw from
    offsets = torch.tensor([one.num_drawn for one in requests], device=logits.device)
    sampling = sampling_tensors([one.params for one in asked], logits.device)
    tokens = sampling.sample(logits, offsets)
    found = [None] * len(requests) if raw is None else _logprobs(raw, tokens, told, asked)
    return [
        failed.get(i) or Drawn(token, one)
        for i, (token, one) in enumerate(zip(tokens.tolist(), found, strict=True))
    ]


def draw_for_pieces(
    logits: Tensor, pieces: Sequence[Piece], asked_of: Callable[[ScheduledRequest], Asked]
) -> list[list[Drawn] | Exception]:
    """What each piece draws, for all that share its prompt, from its last token's logits.

    Args:
        logits: [len(pieces), vocab_size]
    """
    rows = [
        (i, one) for i, piece in enumerate(pieces) if piece.draws for one in piece.request.draws_for
    ]
    if not rows:
        return [[] for _ in pieces]
    requests = [one for _, one in rows]
    drawn = draw(logits[[i for i, _ in rows]], requests, list(map(asked_of, requests)))
    found: list[list[Drawn | Exception]] = [[] for _ in pieces]
    for (i, _), one in zip(rows, drawn, strict=True):
        found[i].append(one)
    return [of_piece(group) for group in found]


def draw_on_device(
    logits: Tensor, pieces: Sequence[Piece], asked_of: Callable[[ScheduledRequest], Asked]
) -> Tensor | None:
    """The tokens [rows] int64 of those pieces that draw, at which the host need not look, -1 where
    logits are NaN; None where none draws.

    Args:
        logits: [len(pieces), vocab_size]
    """
    rows = [i for i, piece in enumerate(pieces) if piece.draws]
    if not rows:
        return None
    device = logits.device
    if len(rows) < len(pieces):
        logits = logits.index_select(0, put(rows, torch.int64, device))
    requests = [pieces[i].request for i in rows]
    sampling = sampling_tensors([asked_of(one).params for one in requests], device)
    offsets = [one.num_drawn + one.num_ahead for one in requests]
    tokens = sampling.sample(logits, put(offsets, torch.int64, device))
    return tokens.masked_fill(logits.isnan().any(-1), -1)


def of_piece(drawn: Sequence[Drawn | Exception]) -> list[Drawn] | Exception:
    """What the requests that share a prompt drew, or the first error among them."""
    error = next((one for one in drawn if isinstance(one, Exception)), None)
    return [one for one in drawn if isinstance(one, Drawn)] if error is None else error


def _shape_(row: Tensor, request: ScheduledRequest, asked: Asked) -> None:
    """Penalties, biases and tokens that are forbidden, in place."""
    options, penalty = asked.options, asked.params.repetition_penalty
    if penalty != 1:
        # A prompt may hold a token that has an embedding and no logit.
        ids = _ids([token for token in set(request.tokens) if token < len(row)], row)
        held = row[ids]
        row[ids] = torch.where(held < 0, held * penalty, held / penalty)
    if options.presence_penalty or options.frequency_penalty:
        counts = Counter(request.tokens[len(request.prompt) :])
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[_ids(list(counts), row)] -= options.frequency_penalty * times + options.presence_penalty
    if options.logit_bias:
        known = {token: bias for token, bias in options.logit_bias.items() if token < len(row)}
        bias = torch.tensor(list(known.values()), dtype=row.dtype, device=row.device)
        row[_ids(list(known), row)] += bias
    if request.forbidden:
        row[_ids([token for token in request.forbidden if token < len(row)], row)] = -torch.inf


def _mask_(logits: Tensor, asked: Sequence[Asked]) -> dict[int, Exception]:
    """What grammars forbid. The masks are filled on the host, on a GPU while the forward that was
    launched before still runs.

    Returns:
        What the grammars of rows raised.
    """
    failed: dict[int, Exception] = {}
    if not any(one.matcher is not None for one in asked):
        return failed
    words = torch.full((len(asked), -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    for i, one in enumerate(asked):
        if one.matcher is not None:
            try:
                one.matcher.fill(words, i)
            except Exception as error:
                failed[i] = error
    apply_token_bitmask_(logits, words.to(logits.device))
    return failed


def _logprobs(
    raw: Tensor, tokens: Tensor, told: Sequence[int], asked: Sequence[Asked]
) -> list[TokenLogprobs | None]:
    """Of each row whose request wants them.

    Args:
        raw: [len(told), vocab_size] log-probabilities of those rows.
        tokens: [rows] int64, what was drawn.
        told: the rows.
        asked: of all rows.
    """
    found: list[TokenLogprobs | None] = [None] * len(tokens)
    chosen = raw.gather(1, tokens[told].unsqueeze(1)).squeeze(1).tolist()
    count = min(max(asked[i].num_told or 0 for i in told), raw.shape[1])
    best = raw.topk(count, dim=-1)
    for i, own, values, ids in zip(
        told, chosen, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        wanted = asked[i].num_told or 0
        found[i] = TokenLogprobs(own, tuple(zip(ids[:wanted], values[:wanted], strict=True)))
    return found


def _ids(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)
