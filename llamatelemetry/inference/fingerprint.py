"""A few elements of each weight, which show a change that torch does not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.pieces.merge import is_plain

_ELEMENTS = 16  # of a weight


class Fingerprint:
    """A few elements of each weight of a model at one moment, spread over it.

    What is written through ``.data``, as merging adapters does, or into inference tensors raises no
    version. Taking and comparing one is a copy of a few KB a device and dtype.
    """

    def __init__(self, model: Any) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            if is_plain(tensor) and tensor.numel():
                few = _some(tensor.detach())
                groups.setdefault((few.device, few.dtype), []).append(few)
        self._views = list(groups.values())
        self._values = [torch.cat(views) for views in self._views]

    def holds(self) -> bool:
        """Whether these elements are still what they were, if the weights lie where they lay."""
        return all(
            torch.equal(torch.cat(views), values)
            for views, values in zip(self._views, self._values, strict=True)
        )


def _some(tensor: Tensor) -> Tensor:
    """A view of some elements of a tensor of any strides, as integers, so that NaN equals NaN."""
    while tensor.ndim > 2:
        tensor = tensor.select(-1, tensor.shape[-1] // 2)
    line = tensor.diagonal() if tensor.ndim == 2 else tensor.view(-1)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    line = line[:: -(-line.shape[0] // _ELEMENTS)]
    return line.view(kinds[line.element_size()]) if line.element_size() in kinds else line
