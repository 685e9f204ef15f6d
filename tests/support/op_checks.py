"""The checks that every op's test file runs: refusals, opcheck, compile, replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.library import opcheck

from llamatelemetry.inference.recording import Recording


def op_of(name: str) -> Any:
    return getattr(torch.ops.llamatelemetry, name).default


def assert_refuses(function: Callable[[], object], *parts: str) -> None:
    """function raises a RuntimeError whose sentence holds every part."""
    with pytest.raises(RuntimeError) as caught:
        function()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def run_opcheck(name: str, *args: object) -> None:
    """torch's four checks of schema, fake and autograd registration, outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        fresh = [a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args]
        opcheck(op_of(name), tuple(fresh))


def assert_compiles(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> None:
    """One full graph with dynamic shapes serves every tuple of inputs (at least three), and gives
    what eager gives; on CUDA also mode="reduce-overhead"."""
    device = next(x for x in inputs[0] if isinstance(x, Tensor)).device
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    modes = [{"backend": backend, "dynamic": True}]
    if device.type == "cuda":
        modes.append({"mode": "reduce-overhead"})
    for options in modes:
        torch._dynamo.reset()
        frames = torch._dynamo.testing.CompileCounterWithBackend(backend)
        if "backend" in options:
            options = options | {"backend": frames}
        compiled = torch.compile(function, fullgraph=True, **options)
        _with_copies(compiled, inputs[0])
        num_frames = frames.frame_count
        for args in inputs:
            ours, eager = (_with_copies(f, args) for f in (compiled, function))
            for a, b in zip(ours, eager, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        if "dynamic" in options:
            assert frames.frame_count == num_frames, "another size was compiled anew"


def _with_copies(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, then the (copied) inputs, which in-place ops change."""
    with torch.inference_mode(False), torch.no_grad():
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        out = function(*copies)
        outputs = [out] if isinstance(out, Tensor) else list(out or ())
        return [o.clone() for o in outputs] + [c for c in copies if isinstance(c, Tensor)]


def assert_replays(
    function: Callable[..., Any], first: tuple[Any, ...], second: tuple[Any, ...]
) -> None:
    """Captured with the first inputs and replayed with the second in their place, function gives
    what it gives eagerly: a CUDA graph on a side stream, or a Recording on the CPU."""
    expected = _with_copies(function, second)
    static = [a.clone() if isinstance(a, Tensor) else a for a in first]
    tensors = [(s, b) for s, b in zip(static, second, strict=True) if isinstance(s, Tensor)]
    if tensors[0][0].device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = function(*static)
        replay = graph.replay
    else:
        with Recording() as recording:
            out = function(*static)
        assert recording.num_launches > 0
        replay = recording.replay
    outputs = [out] if isinstance(out, Tensor) else list(out or ())
    for output in outputs:
        output.view(torch.uint8).fill_(0xFF) if output.numel() else None
    for buffer, value in tensors:
        buffer.copy_(value)
    replay()
    actual = outputs + [s for s in static if isinstance(s, Tensor)]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
