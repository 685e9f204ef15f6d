"""What a request says of its text's form: response_format, and structured_outputs as in vLLM."""

from __future__ import annotations

import json
import threading
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llamatelemetry.inference.structured import Structures
from llamatelemetry.serving.field_names import named

# What refusals of a form are to begin with.
_RESPONSE_FIELDS = {"json_schema": "response_format.json_schema"}
_OUTPUT_FIELDS = {
    argument: f"structured_outputs.{field}"
    for argument, field in (
        ("json_schema", "json"),
        ("regex", "regex"),
        ("choice", "choice"),
        ("grammar", "grammar"),
    )
}
# Fields that say where a text may end, as a form does.
_ENDS = ("min_tokens", "ignore_eos")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchema(_Strict):
    """The json_schema of a response_format; what is no schema only names it."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                "json_schema must come with type json_schema and with no other, got type "
                f"{self.type}"
            )
        return self


class StructuredOutputs(_Strict):
    """One of a JSON schema, a regular expression, a choice and a grammar."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("structured_outputs must hold one of json, regex, choice and grammar")
        return self


def grammar_of(
    form: ResponseFormat | None, outputs: StructuredOutputs | None, structures: Any
) -> Any:
    """What LogitOptions takes, None for free text.

    Args:
        form, outputs: of the request.
        structures: called without arguments where one of them asks for a form, gives Structures.

    Raises:
        ValueError: what of it is not served.
    """
    is_free = form is None or form.type == "text"
    if outputs is None:
        if is_free:
            return None
        assert form is not None
        if form.json_schema is None:
            return structures().json()
        with named(_RESPONSE_FIELDS):
            return structures().json_schema(form.json_schema.schema_)
    if not is_free:
        raise ValueError("response_format must be left out with structured_outputs, got both")
    made = structures()
    with named(_OUTPUT_FIELDS):
        if outputs.json_ is not None:
            return made.json_schema(outputs.json_)
        if outputs.regex is not None:
            return made.regex(outputs.regex)
        if outputs.choice is not None:
            return made.choice(outputs.choice)
        return made.grammar(outputs.grammar)


def check_ends(request: Any, limit: int) -> None:
    """Refuses what of a text's end cannot be.

    Args:
        request: Generation.
        limit: tokens of an answer at most.

    Raises:
        ValueError: naming the field.
    """
    if request.min_tokens > limit:
        most = f"{request.limit_name} ({limit})"
        if request.limit is None:
            most = f"{limit}, what the context or the default leaves without {request.limit_name}"
        raise ValueError(f"min_tokens must be at most {most}, got {request.min_tokens}")
    form = request.response_format
    if request.structured_outputs is None and (form is None or form.type == "text"):
        return
    name = "response_format" if request.structured_outputs is None else "structured_outputs"
    for field in _ENDS:
        if value := getattr(request, field):
            raise ValueError(
                f"{field} must be left out with {name}, which says where the text may end, got "
                f"{json.dumps(value)}"
            )


class StructuresOnce:
    """An engine's Structures, made when first asked for: that takes a while.

    Args:
        engine: InferenceEngine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._made: Structures | None = None

    def __call__(self) -> Structures:
        """
        Raises:
            ValueError: the server has no xgrammar.
        """
        with self._lock:
            if self._made is None:
                try:
                    self._made = Structures(self._engine)
                except ImportError:
                    raise ValueError(
                        "response_format and structured_outputs need the package xgrammar, which "
                        "the server does not have (the extra structured)"
                    ) from None
            return self._made
