"""What users ask with, as token ids: text, messages of a chat, or ids."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_SHOWN = 80  # characters of a wrong prompt in a refusal


class PromptEncoder:
    """Turns prompts into token ids, with the tokenizer's chat template where it has one.

    What a user writes stays text: the name of a control token in it, such as <|im_end|>, gives the
    tokens of its letters. Control tokens come from the template, or in ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # transformers sets up a tokenizer anew for each call

    def encode(
        self,
        prompt: Any,
        system_prompt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: text, which is a user's turn where the tokenizer has a chat template; messages,
                each a mapping with a role and its content; or token ids, which stay as they are.
            system_prompt: a system turn before text.
            tools: descriptions of functions, for the chat template.

        Raises:
            ValueError: for what is none of these, and what the chat template refuses.
        """
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise ValueError(f"system_prompt must be text, got {_shown(system_prompt)}")
        if not isinstance(prompt, str):
            prompt = sequence(prompt)
            is_chat = bool(prompt) and isinstance(prompt[0], Mapping)
            if not is_chat and system_prompt is not None:
                raise ValueError("system_prompt must come with text or messages, got token ids")
            if not is_chat:
                return prompt
        elif not getattr(self.tokenizer, "chat_template", None):
            if system_prompt is not None:
                raise ValueError("system_prompt needs a chat template, and this model has none")
            check_text(prompt)
            with self._lock:
                return self._plain(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system_prompt is not None:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        check_messages(messages)
        with self._lock:
            return self._chat(messages, tools)

    def verbatim(self, text: str) -> list[int]:
        """Token ids of text as the tokenizer has them: names of control tokens are those tokens.

        Raises:
            ValueError: half of a surrogate pair is in it.
        """
        check_text(text)
        with self._lock:
            return list(self.tokenizer.encode(text))

    def _plain(self, text: str) -> list[int]:
        ids = list(self.tokenizer.encode(text, split_special_tokens=True))
        # An end that the tokenizer puts behind a text would be the prompt's last word.
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("prompt: messages need a chat template, and this model has none")
        if not _any_text([messages, tools], self._has_control_tokens):
            return self._parsed(self._rendered(messages, tools))
        # Marks around what users wrote survive the template, and show what is not to be parsed.
        mark = secrets.token_hex(8)
        begin, end = f"\U000f0000{mark}\U000f0001", f"\U000f0001{mark}\U000f0000"

        def marked(text: str) -> str:
            core = text.strip()
            if not core or not self._has_control_tokens(text):
                return text
            before, _, after = text.partition(core)
            return f"{before}{begin}{core}{end}{after}"

        first, *others = self._rendered(_mapped(messages, marked), _mapped(tools, marked)).split(
            begin
        )
        ids = self._parsed(first)
        for other in others:
            literal, found, rest = other.partition(end)
            if not found or end in rest or end in first:
                raise ValueError(
                    "prompt: names a control token in a place where the model's chat template "
                    "does not keep it apart from its own"
                )
            ids += self._literal(literal) + self._parsed(rest)
        return ids

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        from llamatelemetry.inference.chat_template import TemplateRefusal, render

        template = self.tokenizer.chat_template
        if isinstance(template, Mapping):  # several, by name
            if "default" not in template:
                raise ValueError(
                    f"prompt: the model's chat templates must have a default, got {list(template)}"
                )
            template = template["tool_use" if tools and "tool_use" in template else "default"]
        try:
            return render(template, messages, self.tokenizer.special_tokens_map, tools)
        except TemplateRefusal as error:
            raise ValueError(f"prompt: {error}") from error

    def _parsed(self, text: str) -> list[int]:
        """Ids of a template's text, in which names of control tokens are those tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _literal(self, text: str) -> list[int]:
        """Ids of a user's text, in which they are text."""
        encode = self.tokenizer.encode
        return list(encode(text, add_special_tokens=False, split_special_tokens=True))

    def _has_control_tokens(self, text: str) -> bool:
        return self._parsed(text) != self._literal(text) if text else False


def sequence(prompt: Any) -> list[Any]:
    """A prompt that is not text, as a list.

    Raises:
        ValueError: for what is no sequence.
    """
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, bytearray, Mapping)):
        hint = "; messages are a list of them" if isinstance(prompt, Mapping) else ""
        raise ValueError(
            f"prompt must be text or a sequence of token ids, got {_shown(prompt)}{hint}"
        )
    try:
        return list(prompt)
    except TypeError as error:  # a tensor or an array without dimensions
        raise ValueError(
            f"prompt must be text or a sequence of token ids, got {_shown(prompt)}"
        ) from error


def is_a_prompt(value: Any) -> None:
    """Refuses what no prompt is, whatever the model.

    Raises:
        ValueError: for what is neither text nor a sequence.
    """
    if not isinstance(value, str):
        sequence(value)


def check_messages(messages: Sequence[Any]) -> None:
    """Refuses what is no chat.

    Raises:
        ValueError: naming the message.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"prompt: messages[{i}] must have a role and content, got {_shown(message)}"
            )
        content = message.get("content")
        is_call = content is None and any(name not in ("role", "content") for name in message)
        if not isinstance(content, (str, list, tuple)) and not is_call:
            raise ValueError(
                f"prompt: messages[{i}]: content must be text or a list of parts, got "
                f"{_shown(content)}"
            )
        _any_text(message, check_text)


def check_text(text: str) -> None:
    """Refuses a str that is no text.

    Raises:
        ValueError: naming the place of half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt must be text, got half a surrogate pair, {text[error.start]!a}, at "
            f"{error.start}"
        ) from None


def _any_text(value: Any, holds: Callable[[str], Any]) -> bool:
    """Whether something holds of any text in nested lists and mappings; asks of all in turn."""
    if isinstance(value, str):
        return bool(holds(value))
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return any(_any_text(part, holds) for part in value)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Nested lists and mappings with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(part, change) for part in value]
    return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
