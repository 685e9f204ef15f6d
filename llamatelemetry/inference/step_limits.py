"""How many tokens a step of a batch may run on, and of prompts beside those that decode."""

from __future__ import annotations

from dataclasses import dataclass

from llamatelemetry.inference.arguments import at_least

# Tokens of a step, by device.
STEP_TOKENS = {"cpu": 256, "cuda": 4096}
# Of prompts beside those that decode: about what a GPU multiplies while it reads the weights; a CPU
# has no such tokens for nothing, and those that decode wait for each of them.
PREFILL_CHUNK = {"cpu": 64, "cuda": 512}
SPLIT_MULTIPLE = 64  # keys


@dataclass(frozen=True)
class StepLimits:
    """What ContinuousBatching is asked for; None stands for a default of the device.

    Attributes:
        max_batch_size: requests that decode in a step.
        max_step_tokens: tokens of a step.
        prefill_chunk: of prompts, in a step in which others decode.
        split_size: as in ContinuousBatching.

    Raises:
        ValueError: for one that is out of range, by name.
    """

    max_batch_size: int
    max_step_tokens: int | None = None
    prefill_chunk: int | None = None
    split_size: int = 0

    def __post_init__(self) -> None:
        at_least("ContinuousBatching: max_batch_size", self.max_batch_size, 1)
        for name in ("max_step_tokens", "prefill_chunk"):
            if (value := getattr(self, name)) is not None:
                at_least(f"ContinuousBatching: {name}", value, 1)
        if at_least("ContinuousBatching: split_size", self.split_size, 0) % SPLIT_MULTIPLE:
            raise ValueError(
                f"ContinuousBatching: split_size must be a multiple of {SPLIT_MULTIPLE}, got "
                f"{self.split_size}"
            )
        if self.split_size and self.prefill_chunk is not None:
            raise ValueError(
                "ContinuousBatching: prefill_chunk must be None with split_size, where chunks are "
                f"the same whatever others there are, got {self.prefill_chunk}"
            )
        if self.max_step_tokens is not None and self.max_step_tokens < self._least:
            raise ValueError(
                f"ContinuousBatching: max_step_tokens must be at least {self._least} with "
                f"max_batch_size {self.max_batch_size}, so that all can decode in a step, got "
                f"{self.max_step_tokens}"
            )

    @property
    def _least(self) -> int:
        """Tokens of a step: one for each request; of fixed chunks there is one beside them."""
        return self.max_batch_size + (1 if self.split_size else 0)

    def step_tokens(self, device: str) -> int:
        """max_step_tokens on a kind of device."""
        tokens = STEP_TOKENS.get(device, STEP_TOKENS["cuda"])
        return self.max_step_tokens or max(tokens, self._least)

    def chunk(self, device: str) -> int | None:
        """prefill_chunk on a kind of device; None for no limit but the step's.

        Raises:
            ValueError: a step there has fewer tokens.
        """
        if self.split_size:
            return None
        if self.prefill_chunk is None:
            return PREFILL_CHUNK.get(device, PREFILL_CHUNK["cuda"])
        if self.prefill_chunk > (most := self.step_tokens(device)):
            raise ValueError(
                f"ContinuousBatching: prefill_chunk must be at most max_step_tokens ({most}), all "
                f"that a step runs on, got {self.prefill_chunk}"
            )
        return self.prefill_chunk
