"""A decode step recorded once and replayed from C++: the CPU's counterpart of a CUDA graph."""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamatelemetry._native import library

_lib = library.cpu_library
_lib.lt_recording_begin.restype = ctypes.c_void_p
_lib.lt_recording_end.restype = ctypes.c_int64
_lib.lt_recording_replay.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)]
_lib.lt_recording_launch_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
_lib.lt_recording_launch_name.restype = ctypes.c_char_p
_lib.lt_recording_error.restype = ctypes.c_char_p
_lib.lt_recording_free.argtypes = [ctypes.c_void_p]

# They make or describe tensors and compute nothing, so a replay loses nothing without them.
_NO_WORK = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh"}


class RecordingError(RuntimeError):
    """An op that a recording cannot hold.

    Example:
        >>> with Recording():
        ...     torch.ones(2) + 1
        Traceback (most recent call last):
            ...
        llamatelemetry.inference.recording.RecordingError: Recording: every op must be ...
    """


class _OnlyOurOps(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        is_ours = namespace == "llamatelemetry" or name in _NO_WORK
        if not (is_ours or func.is_view):
            raise _refusal(func)
        out = func(*args, **(kwargs or {}))
        # contiguous and reshape are views, or copies where the strides ask for one.
        if not is_ours and not _is_view_of(args[0], out):
            raise _refusal(func)
        return out


def _refusal(func: Any) -> RecordingError:
    return RecordingError(
        f"Recording: every op must be llamatelemetry's or a view, got {func}; its work would be "
        "missing from the replay, so do it before the recording"
    )


def _is_view_of(base: Tensor, out: Any) -> bool:
    parts = (out,) if isinstance(out, Tensor) else out
    pointer = base.untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == pointer for part in parts)


class Recording:
    """Records the CPU launches of its ``with`` body, which also run; ``replay()`` runs them again.

    Pointers, shapes and scalars are frozen; tensors are read afresh, so change inputs in place. The
    recording keeps what ops of ours allocate; the caller keeps every other tensor alive and its
    storage where it is.

    Raises:
        RecordingError: for any op that is neither ours nor a view
        RuntimeError: for a recording inside one.

    Example:
        >>> from llamatelemetry import ops
        >>> x = torch.ones(1, 4)
        >>> with Recording() as recording:
        ...     y = ops.softmax(x)
        >>> x[0, 0] = -torch.inf
        >>> recording.replay()
        >>> y
        tensor([[0.0000, 0.3333, 0.3333, 0.3333]])
    """

    def __init__(self) -> None:
        self.num_launches = 0
        self._handle: int | None = None
        self._guard = _OnlyOurOps()

    def __enter__(self) -> Recording:
        if self._handle is not None:
            raise RuntimeError("Recording: must be entered once, got a second time")
        self._handle = _lib.lt_recording_begin()
        if self._handle is None:
            raise RuntimeError("Recording: must not be inside another recording of this thread")
        self._guard.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guard.__exit__(kind, error, trace)
        self.num_launches = _lib.lt_recording_end()
        if error is not None:
            self.close()

    def replay(self) -> None:
        """Runs every recorded launch again, in order, on torch's threads."""
        self._replay(None)

    def profile(self) -> list[tuple[str, float]]:
        """Replays once; returns name and microseconds of every launch, in order: how much later
        than all before it each was completed, so that they add up to the replay."""
        launch_ns = (ctypes.c_int64 * self.num_launches)()
        self._replay(launch_ns)
        names = (_lib.lt_recording_launch_name(self._handle, i) for i in range(self.num_launches))
        return [(name.decode(), ns / 1e3) for name, ns in zip(names, launch_ns, strict=True)]

    def _replay(self, launch_ns: Any) -> None:
        if self._handle is None:
            raise RuntimeError("Recording: nothing is recorded yet, or it was closed")
        if _lib.lt_recording_replay(self._handle, launch_ns) != 0:
            raise RuntimeError(f"Recording: replay failed: {_lib.lt_recording_error().decode()}")

    def close(self) -> None:
        """Frees the recording and the tensors it keeps."""
        if self._handle is not None:
            _lib.lt_recording_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
