"""The requests of the OpenAI-compatible API: what is taken, and what is refused by name."""

from __future__ import annotations

import dataclasses
import random
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictInt,
    field_validator,
    model_validator,
)

from llamatelemetry.inference.beam_search import MAX_LENGTH_PENALTY
from llamatelemetry.inference.defaults import ModelDefaults, UnsetFloat, UnsetInt
from llamatelemetry.inference.logit_options import MAX_LOGPROBS, LogitOptions
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.serving.beam_fields import check_fields, is_among
from llamatelemetry.serving.messages import Message, Tool
from llamatelemetry.serving.structure import ResponseFormat, StructuredOutputs

MAX_CHOICES = 64  # of one request: n times its prompts
DEFAULT_MAX_TOKENS = 1024  # of a chat that names no limit, if the context leaves so many

# Fields of the API that change nothing here, at the values that say so; others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("", None),
    "echo": (False, None),
    "functions": ([], None),
    "modalities": (["text"], None),
    "reasoning_effort": (None,),
    "audio": (None,),
}
# What refusals of a chat's prompt are to begin with.
PROMPT_FIELDS = {"prompt: messages": "messages", "prompt": "messages"}
# Fields that never change an answer.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
}


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Generation(BaseModel):
    """What a chat and a completion have in common.

    Attributes:
        temperature, top_p, top_k, min_p, repetition_penalty: see SamplingParams; where a request
            has none the model's generation_config holds, and else the defaults here.
        seed: see SamplingParams; none draws one.
        max_tokens: of each choice.
        n: choices for each prompt.
        stop: an answer ends before the first of these strings.
        presence_penalty, frequency_penalty, logit_bias: see LogitOptions.
        min_tokens, stop_token_ids, ignore_eos, priority: see ContinuousBatching.submit_group.
        disable_spec_decode: whether no tokens are drafted for it.
        use_beam_search, length_penalty: whether the choices are the best of as many beams, or of
            best_of, and how their length counts. The names are those of vLLM's API, the search is
            that of transformers; see BeamParams.
        response_format, structured_outputs: what form the text has; at most one of them.
        stream: whether the answer comes in server-sent events.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = UnsetFloat(1.0)
    top_p: Annotated[float, Field(gt=0, le=1)] = UnsetFloat(1.0)
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = UnsetInt(0)
    min_p: Annotated[float, Field(ge=0, le=1)] = UnsetFloat(0.0)
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = UnsetFloat(1.0)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] = Field(default_factory=list)
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[list[int], Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    priority: int = 0
    disable_spec_decode: bool = False
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] = 1.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        """Takes neutral fields out, and refuses those that would change the answer."""
        if not isinstance(values, dict):
            raise ValueError(f"the body must be an object, got {type(values).__name__}")
        kept = {}
        for name, value in values.items():
            if name in NEUTRAL:
                if not is_among(value, NEUTRAL[name]):
                    raise ValueError(f"{name} is not supported by this server, got {value!r:.80}")
            elif name not in IGNORED and not (value is None and name in cls.model_fields):
                kept[name] = value
        return kept

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if not all(stops):
            raise ValueError("stop must not hold an empty string, which stops everything")
        return stops

    @model_validator(mode="wrap")
    @classmethod
    def _searches_or_draws(cls, given: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        made = handler(given)
        check_fields(made, given)
        return made

    @model_validator(mode="after")
    def _streams_with_its_options(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must come with stream true")
        return self

    @property
    def beams(self) -> dict[str, Any]:
        """What submit_group is asked for beside the rest."""
        if not self.use_beam_search or self.num_drawn == 1:  # the only text of its length
            return {}
        return {"num_beams": self.num_drawn, "length_penalty": self.length_penalty}

    @property
    def limit_name(self) -> str:
        """The field that says how many tokens an answer has at most."""
        return "max_tokens"

    @property
    def fields(self) -> dict[str, str]:
        """For field_names.named: what refusals of the batcher are to begin with."""
        drawn = "n" if self.num_drawn == self.n else "best_of"
        return {"num_beams": drawn, "n times": f"{drawn} times", "logits: logit_bias": "logit_bias"}

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_drawn(self) -> int:
        """Answers that are drawn for each prompt."""
        return self.n

    @property
    def num_told(self) -> int | None:
        """Of how many tokens at each place the log-probability is told; None of none."""
        return None

    def options(self, grammar: Any) -> LogitOptions:
        """What the logits are asked for.

        Args:
            grammar: of structure.grammar_of.
        """
        told, is_chosen = self.num_told, self.num_drawn > self.n and not self.use_beam_search
        return LogitOptions(
            self.presence_penalty,
            self.frequency_penalty,
            self.logit_bias,
            0 if told is None and is_chosen else told,
            grammar,
        )

    def sampling(self, defaults: ModelDefaults) -> list[SamplingParams]:
        """One for each answer that is drawn: the seeds follow one another. Of beams one for each
        choice.

        Args:
            defaults: of the model.
        """
        if self.use_beam_search:
            return [GREEDY] * self.n
        first = random.getrandbits(62) if self.seed is None else self.seed
        filled = defaults.filled(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        seeds = ((first + i + 2**63) % 2**64 - 2**63 for i in range(self.num_drawn))
        return [dataclasses.replace(filled, seed=seed) for seed in seeds]


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: Annotated[list[Tool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: Literal[True] = True

    @model_validator(mode="after")
    def _tells_what_it_ranks(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs must come with logprobs true")
        return self

    @property
    def num_told(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def callable_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template is told of, None for nothing."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump() for tool in self.tools]

    @property
    def limit_name(self) -> str:
        is_old = self.max_completion_tokens is None and self.max_tokens is not None
        return "max_tokens" if is_old else "max_completion_tokens"

    @property
    def fields(self) -> dict[str, str]:
        whole = {"prompt and max_tokens": f"messages and {self.limit_name}"}
        return super().fields | whole | PROMPT_FIELDS

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """The body of /v1/completions: a text, token ids, or a list of either."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _chooses_among_enough(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of must be at least n ({self.n}), got {self.best_of}")
        if self.num_drawn > self.n and self.stream:
            raise ValueError("best_of must be n with stream, for the best is known at the end")
        return self

    @property
    def num_drawn(self) -> int:
        return self.best_of or self.n

    @property
    def num_told(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Each prompt.

        Raises:
            ValueError: none, or too many choices.
        """
        prompt = self.prompt
        one = isinstance(prompt, str) or all(isinstance(token, int) for token in prompt)
        several: list[Any] = [prompt] if one else list(prompt)
        if not all(several):
            raise ValueError("prompt must not be empty")
        count = len(several) * self.num_drawn
        if count > MAX_CHOICES:
            drawn = self.fields["num_beams"]
            raise ValueError(
                f"{drawn} times the prompts must be at most {MAX_CHOICES}, got {count}"
            )
        return several
