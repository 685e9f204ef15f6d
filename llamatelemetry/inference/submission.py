"""What submit is asked for, checked and turned into requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.arguments import ContextLengthError, boolean, integer, real
from llamatelemetry.inference.beam_group import beam_handles
from llamatelemetry.inference.beam_search import BeamParams, BeamSearch, EarlyStopping
from llamatelemetry.inference.drawing import Asked
from llamatelemetry.inference.logit_options import NO_OPTIONS, LogitOptions
from llamatelemetry.inference.prompts import sequence
from llamatelemetry.inference.request_handle import RequestHandle, TimeLimits
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.text_stream import TextStream
from llamatelemetry.loading.find import context_length_of


@dataclass(frozen=True)
class Submission:
    """All that answers to one prompt have in common, as submit took it; checked by requests.

    Attributes:
        prompt: token ids, not checked yet.
        others: see ContinuousBatching.submit.
    """

    prompt: Any
    max_tokens: int
    min_tokens: int = 0
    stop_sequences: str | Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    priority: int = 0
    logits: LogitOptions | None = None
    time_limit_s: float | None = None
    wait_limit_s: float | None = None
    shown_tokens: Collection[str] = ()
    num_beams: int = 1
    speculate: bool = True
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    @property
    def options(self) -> LogitOptions:
        return NO_OPTIONS if self.logits is None else self.logits

    def requests(
        self, names: Sequence[int], model: Any, tokenizer: Any, eos: Collection[int]
    ) -> list[ScheduledRequest]:
        """One for each name; the names grow.

        Raises:
            ValueError: for what is of another type or out of range, by name.
        """
        vocab_size = model.get_input_embeddings().num_embeddings
        ids = token_ids("prompt: a token id", sequence(self.prompt), vocab_size)
        if not ids:
            raise ValueError("prompt must hold at least one token, got an empty one")
        count, least = (
            integer("max_tokens", self.max_tokens),
            integer("min_tokens", self.min_tokens),
        )
        if count < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= least <= count:
            raise ValueError(
                f"min_tokens must lie in [0, max_tokens = {count}], got {self.min_tokens}"
            )
        context = context_length_of(model.config)
        if len(ids) + count > context:
            raise ContextLengthError(
                f"prompt and max_tokens must fit the model's context of {context} tokens, got "
                f"{len(ids)} + {count}"
            )
        boolean("speculate", self.speculate)
        boolean("ignore_eos", self.ignore_eos)
        self._check_options(vocab_size)
        stops = token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        ends = frozenset([*stops, *(() if self.ignore_eos else eos)])
        needed = BeamSearch(self.beams, count, least, ends).num_candidates
        if self.num_beams > 1 and needed > vocab_size:
            raise ValueError(
                f"num_beams must be so few that the model has the {needed} tokens of which beams "
                f"are chosen, it has {vocab_size}, got {self.num_beams}"
            )
        token_names("shown_tokens", self.shown_tokens)
        if tokenizer is None and self.stop_sequences:
            raise ValueError("stop_sequences: an engine with a tokenizer must be given for them")
        return [
            ScheduledRequest(
                name,
                ids,
                count,
                min_tokens=least,
                stop_ids=ends,
                priority=integer("priority", self.priority),
                speculates=self.speculate and self.num_beams == 1,
                is_beam=self.num_beams > 1,
                arrival=name,
                text=(
                    TextStream(tokenizer, self.stop_sequences, "stop_sequences", self.shown_tokens)
                    if tokenizer is not None
                    else None
                ),
            )
            for name in names
        ]

    def _check_options(self, vocab_size: int) -> None:
        if self.logits is not None and not isinstance(self.logits, LogitOptions):
            raise ValueError(f"logits must be LogitOptions or None, got {self.logits!r:.80}")
        token_ids("logits: logit_bias", list(self.options.logit_bias), vocab_size)
        if self.options.grammar is not None:
            for name in ("min_tokens", "ignore_eos"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} must be left out with a grammar, which says where the text may "
                        f"end, got {getattr(self, name)}"
                    )

    @property
    def beams(self) -> BeamParams:
        """
        Raises:
            ValueError: as BeamParams does.
        """
        return BeamParams(self.num_beams, self.length_penalty, self.early_stopping)

    def check_beams(self, params: Sequence[SamplingParams | None], most: int) -> int:
        """Refuses what a search of beams has no use for.

        Args:
            params: of each answer.
            most: requests at work at once.

        Returns:
            How many requests there are to be.

        Raises:
            ValueError: naming the argument, the rule and the value.
        """
        count = self.beams.num_beams
        if count == 1:
            for name, unset in (("length_penalty", 1.0), ("early_stopping", False)):
                if (value := getattr(self, name)) != unset:
                    raise ValueError(f"{name} must be left out with num_beams 1, got {value!r}")
            return len(params)
        if count > most:
            raise ValueError(
                f"num_beams must be at most max_batch_size ({most}), for all beams are at work at "
                f"once, got {count}"
            )
        if len(params) > count:
            raise ValueError(
                f"params must be of at most num_beams ({count}) answers, got {len(params)}"
            )
        for one in params:
            if one is not None and (one.temperature > 0 or one.repetition_penalty != 1):
                raise ValueError(
                    "params must be greedy, of temperature 0 and no repetition penalty, or None "
                    f"with num_beams above 1, got {one}"
                )
        if self.options.needs_logits or self.stop_sequences:
            name = "logits" if self.options.needs_logits else "stop_sequences"
            raise ValueError(f"{name} must be left out with num_beams above 1, got {name}")
        return count

    def handles(
        self,
        requests: Sequence[ScheduledRequest],
        params: Sequence[SamplingParams],
        drive: Callable[[Callable[[], bool], float | None], None],
        withdraw: Callable[[], None],
    ) -> list[RequestHandle]:
        """One for each request.

        Args:
            requests: of requests.
            params: of each answer.
            drive, withdraw: as RequestHandle's.

        Raises:
            ValueError: as limits does.
        """
        more, grammar = (drive, withdraw, self.limits()), self.options.grammar
        if self.num_beams > 1:
            return beam_handles(requests, len(params), self.beams, *more)
        found = []
        for request, one in zip(requests, params, strict=True):
            matcher = None if grammar is None else grammar.matcher()
            found.append(RequestHandle(request, Asked(one, self.options, matcher), *more))
        return found

    def limits(self) -> TimeLimits:
        """How long the requests may take.

        Raises:
            ValueError: a limit is no positive number, by name.
        """
        found = {}
        for name, value in (("whole", self.time_limit_s), ("waiting", self.wait_limit_s)):
            if value is not None:
                argument = "time_limit_s" if name == "whole" else "wait_limit_s"
                found[name] = real(argument, value)
                if not found[name] > 0:
                    raise ValueError(f"{argument} must be above 0, got {value}")
        return TimeLimits(**found)


def checked_params(params: Any) -> None:
    """Refuses what is neither SamplingParams nor None.

    Raises:
        ValueError: with the value.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams or None, got {params!r}")


def several_params(params: Any) -> None:
    """Refuses what is no sequence of SamplingParams and None.

    Raises:
        ValueError: with the value.
    """
    if not isinstance(params, Sequence) or isinstance(params, (str, bytes)) or not params:
        raise ValueError(
            f"params must hold at least one SamplingParams or None, got {params!r:.80}"
        )
    for one in params:
        checked_params(one)


def token_names(name: str, names: Any) -> None:
    """Refuses what holds something else than names of tokens.

    Raises:
        ValueError: naming the argument and the value.
    """
    is_several = isinstance(names, Collection) and not isinstance(names, (str, bytes))
    if not is_several or not all(isinstance(one, str) for one in names):
        raise ValueError(f"{name} must be names of tokens, got {names!r:.80}")


def token_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    """ids as a list of ints that the model has.

    Raises:
        ValueError: naming the argument and the value.
    """
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
        raise ValueError(f"{name} must be token ids, got {ids!r}")
    checked = [integer(name, token) for token in ids]
    for token in checked:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token ids must lie in [0, {vocab_size}), got {token}")
    return checked


def eos_of(model: Any) -> Collection[int]:
    """The tokens that end a text of a model, by its generation_config."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if end is None:
        return ()
    return (end,) if isinstance(end, int) else tuple(end)
