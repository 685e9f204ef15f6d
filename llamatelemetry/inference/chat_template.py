"""Chat templates, which come with a model from anywhere: rendered as transformers does, in a
sandbox of bounded steps, seconds and sizes, and refused in one sentence."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # lines and calls; a chat of a thousand turns takes some fifty thousand
MAX_SECONDS = 5.0
MAX_LENGTH = 2**24  # characters or elements of anything that a template makes
MAX_NUMBER = 10**6  # a width or a count that is handed to a function
_MAX_BITS = 2**12
_FILE = "<template>"  # where jinja says that a template's code stands


class TemplateRefusal(ValueError):
    """A chat template that cannot be rendered: one sentence that says why."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a chat up to where the assistant's answer begins.

    Args:
        template: Jinja, with the filters and functions that transformers adds.
        messages: role and content of each turn, in order.
        special_tokens: names as bos_token, as the template sees them.
        tools: descriptions of functions that the model may call.

    Raises:
        TemplateRefusal: the template raises, is no template, or goes on without end.
    """
    if not isinstance(template, str):
        raise TemplateRefusal(f"the model's chat template must be text, got {template!r:.80}")
    try:
        compiled = _compiled(template)
        with _Limits():
            return _joined(
                compiled.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=True,
                    **special_tokens,
                )
            )
    except TemplateRefusal:
        raise
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise TemplateRefusal(f"the model's chat template refuses it: {reason:.300}") from error
    except Exception as error:  # whatever the template's code trips over
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TemplateRefusal(f"the model's chat template fails: {reason:.300}") from error


class _Limits:
    """Counts the lines that template code runs in this thread, by way of sys.settrace."""

    def __enter__(self) -> None:
        self._steps, self._end = 0, time.monotonic() + MAX_SECONDS
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateRefusal(f"the model's chat template takes more than {MAX_STEPS} steps")
        if self._steps % 256 == 0 and time.monotonic() > self._end:
            raise TemplateRefusal(f"the model's chat template takes more than {MAX_SECONDS:g} s")
        return self._trace if frame.f_code.co_filename == _FILE else None


def _refuse_size(what: str) -> None:
    raise TemplateRefusal(f"the model's chat template makes {what} too large")


def _joined(parts: Iterable[str]) -> str:
    """The parts as one text, where that is of a bearable length."""
    found, length = [], 0
    for part in parts:
        length += len(part)
        if length > MAX_LENGTH:
            _refuse_size("a text")
        found.append(part)
    return "".join(found)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        if right * left.bit_length() > _MAX_BITS:
            _refuse_size("a number")
    elif not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
        raise TypeError(f"unsupported operands of **: {type(left)} and {type(right)}")
    return left**right


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            _refuse_size("a number")
    else:
        for many, count in ((left, right), (right, left)):
            if isinstance(count, int) and _length(many) * count > MAX_LENGTH:
                _refuse_size("a text or list")
    return left * right


def _sum(left: Any, right: Any) -> Any:
    if _length(left) + _length(right) > MAX_LENGTH:
        _refuse_size("a text or list")
    return left + right


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left)
    return left % right


def _check_format(text: str) -> None:
    """Refuses widths that a format string says itself."""
    if re.search(r"\d{6}|%[^%]*\*", text):
        _refuse_size("a text")


def _check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses what would make a large text of small arguments."""
    if isinstance(function, type):
        return
    values = [*args, *kwargs.values()]
    if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in values):
        _refuse_size("a text or list")
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if name in ("format", "format_map") and isinstance(owner, str):
        _check_format(owner)
    if name == "join" and isinstance(owner, str) and args:
        _joined(str(part) + owner for part in args[0])
    texts = [owner, *values] if isinstance(owner, str) else values
    sizes = [len(text) for text in filter(_is_text, texts)]
    if name in ("replace", "do_replace") and len(sizes) >= 3:
        whole, old, new = sizes[:3]
        if (whole // max(old, 1) + 1) * new > MAX_LENGTH:
            _refuse_size("a text")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """{% generation %} marks the assistant's part for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012, jinja's name

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with sizes bounded and nothing worked out while a template is compiled."""

    code_generator_class = _Generator
    concat = staticmethod(_joined)
    intercepted_binops = frozenset({"**", "*", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.binop_table |= {
            "**": _power,
            "*": _product,
            "+": _sum,
            "%": _remainder,
        }
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _checked(_to_json)
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}
        del self.globals["lipsum"]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_call(getattr(__obj, "__wrapped__", __obj), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are looked at first."""

    @wraps(function)  # jinja's pass_context and the like are attributes
    def call(*args: Any, **kwargs: Any) -> Any:
        # Where jinja passes its context or environment first, that is no text or number.
        _check_call(function, args, kwargs)
        if function.__name__ == "do_format":
            for text in filter(_is_text, args):
                _check_format(text)
        return function(*args, **kwargs)

    return call


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: without the escapes of HTML that jinja's own adds."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(16)
def _compiled(template: str) -> Any:
    return _Environment().from_string(template)
