"""Work in a process that was forked from one whose threads had done some: it would never end."""

from __future__ import annotations

import os

import torch

_has_run = _is_forked = False


def note_step() -> None:
    """Called where a model is patched, and before each step and each forward that we call.

    A model that its user calls, patched or not, does not come here: in a forked process it waits
    for ever, as torch alone does.

    Raises:
        RuntimeError: the threads that it needs have stayed in the parent process.
    """
    global _has_run
    if _is_forked and torch.get_num_threads() > 1:
        raise RuntimeError(
            "this process was forked from one that had patched a model or run steps, whose threads "
            "it does not have and would wait for: start it by multiprocessing's spawn, or call "
            "torch.set_num_threads(1) in it first"
        )
    _has_run = True


def _note_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or _has_run


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_note_fork)
