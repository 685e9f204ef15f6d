"""Messages of a chat, and descriptions of the functions that the model may call."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


class TextPart(BaseModel):
    """A part of a message's content; texts alone are taken."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """A function's name and arguments, as a message tells of a call."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(extra="ignore")  # clients send back what a stream gave: its index

    id: str
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: the arguments as a mapping."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tool_calls: arguments must be JSON: {error}") from None
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content must be text where a message has no tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls must be the assistant's, got role {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: one text, and no role that they do not know."""
        content = self.content or ""
        parts = [content] if isinstance(content, str) else [part.text for part in content]
        role = "system" if self.role == "developer" else self.role
        body: dict[str, Any] = {"role": role, "content": "".join(parts)}
        if self.tool_calls:
            body["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            body |= {k: v for k in ("name", "tool_call_id") if (v := getattr(self, k)) is not None}
        return body


class Tool(BaseModel):
    """A function that the model may call: its description goes to the chat template as it is."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: dict[str, Any]

    @field_validator("function")
    @classmethod
    def _has_a_name(cls, function: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(function.get("name"), str):
            raise ValueError("function must have a name")
        return function
