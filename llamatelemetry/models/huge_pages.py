"""Weights on the CPU in huge pages, so that a token, which reads them all, looks up few addresses.

Nothing moves for the program: the kernel copies what lies in many small pages into a huge one and
puts that at the same addresses.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from llamatelemetry.models.pieces.merge import is_plain

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_HUGEPAGE = 14  # later, when the kernel next looks through the memory of processes
_MADV_COLLAPSE = 25  # at once; since Linux 6.1, which does it whatever the setting is
# What weights must fill of a huge page: it takes memory for the rest of it too.
_LEAST_SHARE = 0.5


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Asks the kernel to put the memory of tensors on the CPU in huge pages, where it may.

    Returns:
        Bytes that it has put there; what it will only look at later does not count.
    """
    size = _huge_page_bytes()
    if size == 0:
        return 0
    moved = 0
    for page in _pages(tensors, size):
        if _madvise(page * size, size, _MADV_COLLAPSE) == 0:
            moved += size
        else:  # an older kernel, or no huge page is free
            _madvise(page * size, size, _MADV_HUGEPAGE)
    return moved


def _huge_page_bytes() -> int:
    """0 where there are none, or where who runs the machine wants none."""
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # a kernel without them
        return 0


def _pages(tensors: Iterable[Tensor], size: int) -> list[int]:
    """Numbers of the huge pages of which tensors' memory fills enough, in order."""
    filled: Counter[int] = Counter()
    for begin, end in _spans(tensors):
        for page in range(begin // size, -(-end // size)):
            filled[page] += min(end, (page + 1) * size) - max(begin, page * size)
    return sorted(page for page, nbytes in filled.items() if nbytes >= _LEAST_SHARE * size)


def _spans(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Begin and end of memory on the CPU that tensors lie in, each byte once.

    That is whole storages: a view's own sizes do not tell where its memory is, as one of some
    columns has gaps, and one that is expanded has more elements than memory.
    """
    whole = [x.untyped_storage() for x in tensors if x.device.type == "cpu" and is_plain(x)]
    reached = 0
    for begin, nbytes in sorted({(one.data_ptr(), one.nbytes()) for one in whole}):
        end = begin + nbytes
        if end > (begin := max(begin, reached)):
            yield begin, end
            reached = end


def _madvise(begin: int, nbytes: int, advice: int) -> int:
    """0 where the kernel has followed the advice; it need not, so no error is one of ours."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    result: int = madvise(begin, nbytes, advice)
    return result
