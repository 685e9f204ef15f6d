"""What stands for a CUDA graph where there is no CUDA: the same work again, into the same tensors.

A function that uses this package's CPU ops alone is replayed from a Recording, a block of any ops
from a tape of them, and any other function by calling it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llamatelemetry.inference.recording import Recording, RecordingError


class _Tape(TorchDispatchMode):
    """Notes every op that runs, and whether the recording around it could hold all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.is_recordable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except RecordingError:
            self.is_recordable = False
            with _disable_current_modes():
                out = func(*args, **kwargs)
        self.ops.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.ops:
            new = func(*args, **kwargs)
            if not func.is_view and not copy_into(out, new):
                raise RuntimeError(
                    f"CUDAGraph: every op must give the shapes of its capture, got others from "
                    f"{func}; as in a CUDA graph, shapes must not depend on values"
                )


class EagerReplay:
    """Runs a body once, in ``with``, and again at each ``replay``.

    Args:
        function: the body, called anew where its ops cannot be recorded; None where the body is
            the ``with`` block itself.
    """

    def __init__(self, function: Callable[[], Any] | None = None) -> None:
        self._function = function
        self._recording: Recording | None = Recording()
        self._tape: _Tape | None = _Tape()
        self.result: Any = None

    def __enter__(self) -> EagerReplay:
        assert self._recording is not None
        assert self._tape is not None
        self._recording.__enter__()
        self._tape.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._recording is not None
        assert self._tape is not None
        self._tape.__exit__(*error)
        self._recording.__exit__(*error)
        if not self._tape.is_recordable or not self._recording.num_launches:
            self._recording.close()
            self._recording = None
        if self._recording is None and self._function is not None:
            self._tape = None
        # Beside a recording the tape only keeps tensors alive: the recording holds pointers.

    def run(self) -> Any:
        """Runs the function for the first time and returns its result."""
        assert self._function is not None
        with self:
            self.result = self._function()
        return shallow_copy(self.result)

    def replay(self) -> Any:
        """Runs the body again; returns the result, whose tensors hold the new values."""
        with torch.inference_mode():  # so that any tensor may be written, inference tensors too
            if self._recording is not None:
                self._recording.replay()
            elif self._tape is not None:
                self._tape.replay()
            elif self._function is not None and not copy_into(self.result, new := self._function()):
                self.result = new
        return shallow_copy(self.result)

    def close(self) -> None:
        """Frees what the replays need."""
        if self._recording is not None:
            self._recording.close()
        self._recording = self._tape = self._function = self.result = None


def copy_into(old: Any, new: Any) -> bool:
    """Copies the tensors of one result into those of another; False where they do not match."""
    old_leaves, old_tree = pytree.tree_flatten(old)
    new_leaves, new_tree = pytree.tree_flatten(new)
    if old_tree != new_tree:
        return False
    if not all(map(_match, old_leaves, new_leaves)):
        return False
    for a, b in zip(old_leaves, new_leaves, strict=True):
        if isinstance(a, Tensor) and a is not b:
            a.copy_(b)
    return True


def shallow_copy(result: Any) -> Any:
    """Lists and dicts anew, so that what a caller does to one does not reach the next."""
    return copy.copy(result) if isinstance(result, (list, dict)) else result


def _match(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return False
    try:
        return old is new or bool(old == new)
    except Exception:  # arrays and the like, whose comparison is no truth value
        return False
