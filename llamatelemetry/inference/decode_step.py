"""One token for every row of a batch, run eagerly once, then recorded (CPU) or captured (CUDA)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.frozen import Frozen
from llamatelemetry.inference.recording import Recording, RecordingError
from llamatelemetry.inference.sampling import GREEDY, SamplingTensors
from llamatelemetry.inference.step import Chunk, prepare, put, table_of
from llamatelemetry.inference.step_graphs import StepGraphs
from llamatelemetry.inference.step_tensors import StepTensors
from llamatelemetry.models.patching import (
    embedding_of,
    forward_tokens,
    ops_of,
    why_not_forward_tokens,
)
from llamatelemetry.models.step_input import DecoderState

_log = logging.getLogger("llamatelemetry")


class DecodeStep:
    """One token for every row of a batch, and the tensors that say where the rows stand.

    They stay where they are, so the first run's recording or graph serves all later runs, of other
    rows too, which load puts in place.

    Attributes:
        mode: "recorded" (CPU), "graph" (CUDA), or "eager": before the first run, and on the CPU
            where an op of the model cannot be recorded.
        recording: the CPU's recording once there is one, to be profiled.
        owner: whose rows are loaded, whatever the caller named.
        logits: [batch, vocab_size] of the last run; there are none before the first.
    """

    logits: Tensor
    draws_outside = False  # whether the next tokens are drawn by ops that no recording holds

    def __init__(
        self,
        model: Any,
        state: DecoderState,
        batch: int,
        width: int,
        size: int,
        graphs: StepGraphs | None = None,
    ) -> None:
        device = state.caches[0][0].device
        blank = [Chunk([0], 0, [])] * batch
        self._init_run(model, state, size, graphs)
        self._table = table_of(blank, width)  # on the host, as the input has it
        self._lay(StepTensors(batch, batch, width, batch, device))
        self.input = self.tensors.input(longest=1)
        self.tensors.place(blank, [False] * batch, [GREEDY] * batch, [0] * batch, size)
        self.active = torch.zeros_like(self.input_ids, dtype=torch.bool)
        self._drawn = torch.zeros_like(self.input_ids)  # on CUDA, with -1 for NaN

    def _lay(self, tensors: StepTensors) -> None:
        """Runs read these."""
        self.tensors, self.input_ids = tensors, tensors.input_ids
        self.sampling, self.offsets = tensors.sampling, tensors.offsets

    def _init_run(
        self, model: Any, state: DecoderState, size: int, graphs: StepGraphs | None
    ) -> None:
        """What runs look at beside the tensors."""
        self._ops = ops_of(model)
        self.mode = "eager"
        self.recording: Recording | None = None
        self.owner: object = None
        self._model, self._state, self._page_size = model, state, size
        self._graphs = StepGraphs() if graphs is None else graphs
        self._replay: Callable[[], None] | None = None
        self._frozen: Frozen | None = None  # of the run that was recorded or captured
        self._embed: Callable[[Tensor, Tensor], Tensor] | None = None  # before each replay

    @property
    def width(self) -> int:
        return self.input.block_table.shape[1]

    @property
    def has_run(self) -> bool:
        """Whether it is past its first run, which may record or capture it."""
        return self._replay is not None

    @property
    def replays(self) -> bool:
        """Whether a run is a replay, which looks at nothing but its tensors."""
        return self.mode in ("recorded", "graph")

    @property
    def is_stale(self) -> bool:
        """Whether a replay is of weights, numbers or pieces that are others now."""
        return self.replays and (self._frozen is None or not self._frozen.holds())

    @property
    def reads_elsewhere(self) -> bool:
        """Whether a replay reads memory that weights have left, which may have been given back."""
        return self.replays and (self._frozen is None or not self._frozen.is_in_place())

    @property
    def is_other(self) -> bool:
        """Whether a replay that reads the weights where they are is not the model's as it is."""
        return self.replays and (self._frozen is None or not self._frozen.is_alike())

    @property
    def runs_ahead(self) -> bool:
        """Whether the next run may be launched before the host has seen what this one drew: on the
        stream that all memory is given away and taken back on, so that no order is lost."""
        if self.mode != "graph":
            return False
        device = self.input_ids.device
        return bool(torch.cuda.current_stream(device) == torch.cuda.default_stream(device))

    def versions(self) -> list[int]:
        """How often each weight was changed in place, of a step that replays."""
        return [] if self._frozen is None else self._frozen.versions()

    def buffers(self) -> list[Tensor]:
        """What runs read and write, but for the logits, which a graph's own memory holds."""
        held = {**vars(self.input), **vars(self.sampling), **vars(self), "logits": None}
        return [one for one in held.values() if isinstance(one, Tensor)]

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
        slots_of = self._ops.slot_mapping
        self._table = table_of(rows, self.width)
        ids, step = prepare(rows, self._page_size, self.width, device, slots_of, self._table)
        self.input_ids.copy_(ids)
        for name in ("positions", "slot_mapping", "block_table", "cache_seqlens"):
            getattr(own, name).copy_(getattr(step, name))
        self.tensors.copy_sampling_(sampling)
        self.offsets.copy_(put(offsets, torch.int64, device))
        self.owner = owner
        self.hold(active)

    def hold(self, active: Sequence[bool]) -> None:
        """Rows that are not active stay where they are from now on, and write nothing."""
        self.active.copy_(put(active, torch.bool, self.active.device))
        self.input.slot_mapping.masked_fill_(~self.active, -1)

    def add_blocks(self, added: Sequence[tuple[int, int, int]]) -> None:
        """Gives rows more blocks behind those they have.

        Args:
            added: (row, column, block) of each, at least one.
        """
        rows, columns, blocks = torch.tensor(added).unbind(1)
        self._table[rows, columns] = blocks.to(torch.int32)
        own = self.input.block_table
        # Whole: rows of equal length need their blocks in the same step, and each copy has a price.
        own.copy_(self._table.pin_memory() if own.is_cuda else self._table, non_blocking=True)

    def drawn(self) -> Tensor:
        """What the last run drew, [batch] int64; -1 for a row whose logits are NaN. The next run
        overwrites it."""
        if self.input_ids.is_cuda:
            return self._drawn
        if not (self.input_ids == 0).any():  # what a row of NaN alone gives
            return self.input_ids
        lost = (self.input_ids == 0) & self.logits.isnan().any(-1)
        return self.input_ids.masked_fill(lost, -1)

    def run(self) -> Tensor:
        """The next token of each row, [batch] int64, overwritten by the next run."""
        if self._replay is not None:
            self._replay()
            return self.input_ids
        # Patching anew where modules were replaced runs probes, which no recording may hold.
        why_not_forward_tokens(self._model, renew=True)
        if self.input_ids.is_cuda:
            self._capture()
        else:
            self._record()
        if self.replays:
            self._frozen = Frozen(self._model)
        return self.input_ids

    def _next_ids(self, logits: Tensor) -> Tensor:
        return self.sampling.sample(logits, self.offsets, draw=self._ops.sample)

    def _run_eagerly(self) -> None:
        self._run_forward()
        self._draw()

    def _run_forward(self) -> None:
        self.logits = forward_tokens(self._model, self.input_ids, self.input, self._state)

    def _draw(self) -> None:
        """Chooses the next tokens by the logits and puts them in place."""
        step = self.input
        self._ops.advance_step_(
            self.input_ids,
            step.positions,
            step.slot_mapping,
            step.cache_seqlens,
            self.offsets,
            self._next_ids(self.logits),
            self.active,
            step.block_table,
            self._page_size,
        )
        if self.input_ids.is_cuda:
            lost = self.logits[:, 0].isnan()  # of a row of NaN alone: the sampler shuns others
            self._drawn.copy_(self.input_ids.masked_fill(lost, -1))

    def _record(self) -> None:
        if _hooked(self._model):  # a replay would not call them
            self._replay = self._run_eagerly
            return self._run_eagerly()
        self._embed = embedding_of(self._model)
        self._put_embedded()
        try:
            with Recording() as recording:
                self._run_forward()
                if not self.draws_outside:
                    self._draw()
        except RecordingError as error:
            _log.info("decoding eagerly: %s", error)
            self._embed = self.input.embedded = None
            self._replay = self._run_eagerly
            return self._run_eagerly()
        self.mode = "recorded"
        self.recording = recording
        self._replay = recording.replay
        if self.draws_outside:
            self._draw()
        if self.draws_outside or self._embed is not None:
            self._replay = self._replay_and_more
        return None

    def _replay_and_more(self) -> None:
        """A replay between what no recording holds."""
        assert self.recording is not None
        self._put_embedded()
        self.recording.replay()
        if self.draws_outside:
            self._draw()

    def _put_embedded(self) -> None:
        if self._embed is None:
            return
        rows = self._embed(self.input_ids, self.input.positions)
        if self.input.embedded is None:
            with torch.inference_mode(False):  # later runs may be in another mode
                self.input.embedded = torch.empty_like(rows)
        self.input.embedded.copy_(rows)

    def _capture(self) -> None:
        # A replay would not call hooks, and could not send other tokens to other experts.
        if _hooked(self._model) or has_experts(self._model):
            self._replay = self._run_eagerly
            return self._run_eagerly()
        self._replay = self._graphs.capture(self._run_eagerly, self.input_ids.device)
        self.mode = "graph"
        return None


def modules_of(model: Any) -> list[tuple[Any, int]]:
    """The modules of a model and how many hooks each has, which a recording or graph has frozen
    too. They are kept, so that no new one can be taken for an old one."""
    return [
        (module, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def has_experts(model: Any) -> bool:
    """Whether a model routes tokens to experts: transformers' modules, which may choose on the
    host which of them to run."""
    names = (name.rpartition(".")[2] for name, _ in model.named_modules())
    return any("experts" in name or "moe" in name for name in names)


def _hooked(model: Any) -> bool:
    return any(count for _, count in modules_of(model))
