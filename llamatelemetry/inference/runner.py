"""Steps of a patched model over its paged cache: eager, recorded (CPU) or captured (CUDA)."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamatelemetry.inference.kv_pages import KvPages, floating_parameter
from llamatelemetry.inference.recording import Recording, RecordingError
from llamatelemetry.inference.sampling import GREEDY, SamplingTensors, sampling_tensors
from llamatelemetry.inference.step import Chunk, prepare
from llamatelemetry.models.patching import forward_tokens, rope_tables
from llamatelemetry.models.step_input import DecoderState
from llamatelemetry.ops import advance_step_

_log = logging.getLogger("llamatelemetry")

PAGE_SIZE = 64  # tokens; a page is one contiguous run for the attention kernels
# Decode steps that are kept, one a number of rows: each holds its activations.
MAX_DECODE_STEPS = 4


class DecodeStep:
    """One token for every row of a batch, and the tensors that say where the rows stand.

    They stay where they are, so the first run's recording or graph serves all later runs, of other
    rows too, which load puts in place.

    Attributes:
        mode: "recorded" (CPU), "graph" (CUDA), or "eager": before the first run, and on the CPU
            where an op of the model cannot be recorded.
        recording: the CPU's recording once there is one, to be profiled.
        owner: whose rows are loaded, whatever the caller named.
    """

    def __init__(self, model: Any, state: DecoderState, batch: int, width: int, size: int) -> None:
        device = state.caches[0][0].device
        blank = [Chunk([0], 0, [])] * batch
        self.input_ids, self.input = prepare(blank, size, width, device)
        self.input.is_whole = False
        self.sampling = sampling_tensors([GREEDY] * batch, device)
        self.offsets = torch.zeros_like(self.input_ids)
        self.active = torch.zeros_like(self.input_ids, dtype=torch.bool)
        self.mode = "eager"
        self.recording: Recording | None = None
        self.owner: object = None
        self._model, self._state, self._page_size = model, state, size
        self._replay: Callable[[], None] | None = None

    @property
    def width(self) -> int:
        return self.input.block_table.shape[1]

    def load(
        self,
        owner: object,
        rows: Sequence[Chunk],
        sampling: SamplingTensors,
        offsets: Sequence[int],
        active: Sequence[bool],
    ) -> None:
        """Puts other rows in place.

        Args:
            owner: a name for them.
            rows: the last token of each, whose keys are not in the cache yet.
            sampling: how each row's next token is chosen.
            offsets: how many tokens each row has drawn.
            active: see hold.
        """
        device, own = self.input_ids.device, self.input
        ids, step = prepare(rows, self._page_size, self.width, device)
        self.input_ids.copy_(ids)
        for name in ("positions", "slot_mapping", "block_table", "cache_seqlens"):
            getattr(own, name).copy_(getattr(step, name))
        self.sampling.copy_(sampling)
        self.offsets.copy_(torch.tensor(offsets))
        self.owner = owner
        self.hold(active)

    def hold(self, active: Sequence[bool]) -> None:
        """Rows that are not active stay where they are from now on, and write nothing."""
        self.active.copy_(torch.tensor(active, dtype=torch.bool))
        self.input.slot_mapping.masked_fill_(~self.active, -1)

    def run(self) -> Tensor:
        """The next token of each row, [batch] int64, overwritten by the next run."""
        if self._replay is not None:
            self._replay()
        elif self.input_ids.is_cuda:
            self._capture()
        else:
            self._record()
        return self.input_ids

    def _next_ids(self, logits: Tensor) -> Tensor:
        return self.sampling.sample(logits, self.offsets)

    def _run_eagerly(self) -> None:
        step = self.input
        logits = forward_tokens(self._model, self.input_ids, step, self._state)
        advance_step_(
            self.input_ids,
            step.positions,
            step.slot_mapping,
            step.cache_seqlens,
            self.offsets,
            self._next_ids(logits),
            self.active,
            step.block_table,
            self._page_size,
        )

    def _record(self) -> None:
        try:
            with Recording() as recording:
                self._run_eagerly()
        except RecordingError as error:
            _log.info("decoding eagerly: %s", error)
            self._replay = self._run_eagerly
            self._run_eagerly()
        else:
            self.mode = "recorded"
            self.recording = recording
            self._replay = recording.replay

    def _capture(self) -> None:
        """Runs once, which warms up what the capture must not do, then captures for later runs.

        All of it under the model's own device: torch captures on a stream of the current one.
        """
        device = self.input_ids.device
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._run_eagerly()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # thread_local: what other threads do meanwhile is no error of this capture.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._run_eagerly()
        if any("graph is empty" in str(warning.message).lower() for warning in caught):
            raise RuntimeError(
                f"DecodeStep: the graph must hold the step's kernels, got an empty one on {device}"
            )
        self.mode = "graph"
        self._replay = graph.replay


_Step = TypeVar("_Step", bound=DecodeStep)


class StepRunner:
    """The steps of one model over its paged cache. Not thread-safe: the caller holds a lock.

    Args:
        max_steps: decode steps that are kept at most, one a number of rows.

    Attributes:
        pages: KvPages, the cache.
        state: DecoderState, the cache and the tables of the rotary embedding.
    """

    def __init__(
        self, model: Any, page_size: int = PAGE_SIZE, max_steps: int = MAX_DECODE_STEPS
    ) -> None:
        self.model, self.max_steps = model, max_steps
        self.pages = KvPages.for_model(model, 0, page_size)
        self._rope: list[tuple[Tensor, Tensor]] = []
        self.state = DecoderState(caches=self.pages.layers, rope=self._rope)
        self._num_positions = 0
        # by kind and rows, the last used last
        self._steps: OrderedDict[tuple[type, int], DecodeStep] = OrderedDict()
        self._pointers = _pointers(model)

    def serves(self, model: Any) -> bool:
        """Whether what is in the cache is of this model as it is now: its dtype and device."""
        like = floating_parameter(model)
        is_alike = (like.dtype, like.device) == (self.pages.dtype, self.pages.device)
        return model is self.model and is_alike

    def ready(self, num_positions: int, num_blocks: int, *, keep: bool) -> bool:
        """Grows the tables and the cache to these sizes where they are smaller; drops the decode
        steps where a pointer that they have frozen is no longer right.

        Args:
            num_positions: of the longest sequence, for the rotary embedding.
            num_blocks: of the cache.
            keep: whether the blocks there are hold what somebody needs.

        Returns:
            Whether the weights lie where they lay: others may stand in their place.

        Raises:
            ValueError: for a rotary embedding that has no table for so many positions.
        """
        pointers = _pointers(self.model)
        same_weights = pointers == self._pointers
        num_positions = max(num_positions, self._num_positions)
        if (pointers, num_positions) != (self._pointers, self._num_positions):
            self._steps.clear()
            self._rope[:] = rope_tables(self.model, num_positions)
            self._pointers, self._num_positions = pointers, num_positions
        if num_blocks > self.pages.num_blocks:
            self._steps.clear()
            self.pages.grow(num_blocks, keep=keep)
        return same_weights

    def drop_steps(self) -> None:
        """Forgets the decode steps, as after an error in one."""
        self._steps.clear()

    def prefill(
        self, chunks: Sequence[Chunk], width: int, kept: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [batch, vocab_size] of the last token of each chunk, or of the tokens whose places
        among those of all chunks are kept."""
        device = self.pages.device
        ids, step = prepare(chunks, self.pages.page_size, width, device)
        if kept is not None:
            step.kept = torch.tensor(kept, dtype=torch.int64).to(device)
        return forward_tokens(self.model, ids, step, self.state)

    def steps(self) -> list[DecodeStep]:
        """Those that are at hand, the last used last."""
        return list(self._steps.values())

    def decode_step(self, batch: int, width: int) -> DecodeStep:
        """The step for so many rows of at most width blocks, a new one where none is at hand."""
        return self.step_of(DecodeStep, batch, width)

    def step_of(self, kind: type[_Step], batch: int, width: int) -> _Step:
        """decode_step of another kind."""
        step = self._steps.get((kind, batch))
        if not isinstance(step, kind) or step.width < width:
            self._steps.pop((kind, batch), None)
            while len(self._steps) >= self.max_steps:
                self._steps.popitem(last=False)
            step = kind(self.model, self.state, batch, width, self.pages.page_size)
            self._steps[kind, batch] = step
        self._steps.move_to_end((kind, batch))
        return step


def _pointers(model: Any) -> list[int]:
    """Where the weights of a model lie: what a recording or a graph has frozen."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
