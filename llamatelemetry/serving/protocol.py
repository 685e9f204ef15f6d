"""The requests of the OpenAI-compatible API: what is taken, and what is refused by name."""

from __future__ import annotations

import dataclasses
import random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llamatelemetry.inference.defaults import ModelDefaults, UnsetFloat, UnsetInt
from llamatelemetry.inference.sampling import SamplingParams

MAX_CHOICES = 64  # of one request: n times its prompts
DEFAULT_MAX_TOKENS = 1024  # of a chat that names no limit, if the context leaves so many

# Fields of the API that change nothing here, at the values that say so; others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "logprobs": (False, 0, None),
    "top_logprobs": (0, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "echo": (False, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "reasoning_effort": (None,),
    "audio": (None,),
}
# Fields that never change an answer.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
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
                if value not in NEUTRAL[name]:
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

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: ModelDefaults) -> list[SamplingParams]:
        """One for each of the n choices: the seeds follow one another.

        Args:
            defaults: of the model.
        """
        first = random.getrandbits(62) if self.seed is None else self.seed
        filled = defaults.filled(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        seeds = ((first + i + 2**63) % 2**64 - 2**63 for i in range(self.n))
        return [dataclasses.replace(filled, seed=seed) for seed in seeds]


class TextPart(BaseModel):
    """A part of a message's content; texts alone are taken."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it: one text, and no role that they do not know."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(parts)}


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """The body of /v1/completions: a text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]

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
        if len(several) * self.n > MAX_CHOICES:
            raise ValueError(
                f"n times the prompts must be at most {MAX_CHOICES}, got {len(several) * self.n}"
            )
        return several
