"""What a batch does, in a terminal or a notebook, while it does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from llamatelemetry.inference.telemetry import Telemetry

WINDOW_S = 10.0  # what rates and percentiles are of


def live(telemetry: Telemetry, console: Console | None = None, per_second: float = 4.0) -> Live:
    """A view to be entered as a context, which draws itself until it is left.

    Args:
        telemetry: of a ContinuousBatching.
        console: where; None is standard output, or the notebook's cell.
        per_second: how often.
    """
    view: Callable[[], Table] = lambda: table(telemetry.summary(WINDOW_S))  # noqa: E731
    return Live(get_renderable=view, console=console, refresh_per_second=per_second)


def table(found: Mapping[str, Any]) -> Table:
    """Of Telemetry.summary."""
    made = Table(title=f"the last {WINDOW_S:g} s", title_justify="left", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    made.add_row("running, waiting", f"{found['running']}, {found['waiting']}")
    made.add_row("cache in use", f"{found['cache_usage']:.0%}")
    made.add_row("decode", f"{found['decode_tokens_per_second']:.1f} tok/s")
    made.add_row("prefill", f"{found['prompt_tokens_per_second']:.1f} tok/s")
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("queue_delay", "queue")):
        made.add_row(f"{label} p50, p95", _ms(found[name], "p50", "p95"))
    made.add_row("step p50, p99", _ms(found["step_seconds"], "p50", "p99"))
    made.add_row("requests ended", str(found["requests"]))
    made.add_row("prompt tokens cached", str(found["cached_tokens"]))
    made.add_row("preemptions", str(found["preemptions"]))
    if drafted := found["drafted_tokens"]:
        made.add_row(
            "drafted tokens, right", f"{drafted}, {found['accepted_tokens'] / drafted:.0%}"
        )
    return made


def _ms(values: Mapping[str, float], *names: str) -> str:
    shown = ["-" if math.isnan(values[n]) else f"{values[n] * 1e3:.1f}" for n in names]
    return ", ".join(shown) + " ms"
