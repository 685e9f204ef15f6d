"""What submit is asked for, checked and turned into requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.arguments import ContextLengthError, integer, real
from llamatelemetry.inference.logit_options import NO_OPTIONS, LogitOptions
from llamatelemetry.inference.prompts import sequence
from llamatelemetry.inference.request_handle import TimeLimits
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
        if integer("num_beams", self.num_beams) != 1:
            raise ValueError(
                "num_beams must be 1, for requests of a batch are drawn token by token, got "
                f"{self.num_beams}; model.generate(..., num_beams={self.num_beams}) searches beams"
            )
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
        if not isinstance(self.speculate, bool):
            raise ValueError(f"speculate must be True or False, got {self.speculate!r}")
        self._check_options(vocab_size)
        stops = token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        if tokenizer is None and self.stop_sequences:
            raise ValueError("stop_sequences: an engine with a tokenizer must be given for them")
        return [
            ScheduledRequest(
                name,
                ids,
                count,
                min_tokens=least,
                stop_ids=frozenset([*stops, *(() if self.ignore_eos else eos)]),
                priority=integer("priority", self.priority),
                speculates=self.speculate,
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
