"""The order of a cache's work on a GPU, whatever stream each caller has."""

from __future__ import annotations

from typing import Any

import torch


class StreamOrder:
    """Lets each step begin once the work of those before it is over.

    Args:
        device: of the cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # of the last step

    def follow(self) -> None:
        """What the caller's stream is given from now on waits for all that the last caller's was
        given."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)
            self._stream = stream
