"""One token for every row of a batch: recorded or captured once, replayed for every later one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.recording import Recording, RecordingError
from llamatelemetry.inference.sampling import GREEDY, SamplingParams, sampling_tensors
from llamatelemetry.models.patching import forward_tokens, rope_tables
from llamatelemetry.models.step_input import DecoderState, StepInput

_log = logging.getLogger("llamatelemetry")

PAGE_SIZE = 64  # tokens; a page is one contiguous run for the attention kernels


class DecodeStep:
    """The decode step of ``batch`` rows of up to ``num_tokens`` tokens, and the cache it works on.

    Every tensor that it reads stays where it is, so the first run's recording (CPU) or graph (CUDA)
    serves all later runs, of other batches too.

    input:     StepInput of one token a row; its block table serves the prefill as well
    state:     DecoderState: the cache and the tables of the rotary embedding
    mode:      "recorded" (CPU), "graph" (CUDA), or "eager": before the first run, and on the CPU
               where an op of the model cannot be recorded
    recording: the CPU's recording once there is one, to be profiled
    """

    def __init__(self, model: Any, batch: int, num_tokens: int) -> None:
        config = model.config
        like = next(p for p in model.parameters() if p.is_floating_point())
        device = like.device
        blocks_per_row = -(-num_tokens // PAGE_SIZE)
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        shape = (batch * blocks_per_row, PAGE_SIZE, config.num_key_value_heads, head_dim)
        table = torch.arange(shape[0], dtype=torch.int32, device=device)
        self.input = StepInput(
            positions=torch.zeros(batch, dtype=torch.int64, device=device),
            slot_mapping=torch.zeros(batch, dtype=torch.int64, device=device),
            block_table=table.view(batch, blocks_per_row),
            cache_seqlens=torch.zeros(batch, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device),
            max_seqlen_q=1,
            is_whole=False,
        )
        self.state = DecoderState(
            caches=[
                (like.new_empty(shape), like.new_empty(shape))
                for _ in range(config.num_hidden_layers)
            ],
            rope=rope_tables(model, blocks_per_row * PAGE_SIZE),
        )
        self.mode = "eager"
        self.recording: Recording | None = None
        self._model, self._pointers = model, _pointers(model)
        self._sampler = sampling_tensors([GREEDY] * batch, device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(batch, dtype=torch.int64, device=device)
        self._active = torch.ones(batch, dtype=torch.int64, device=device)
        self._next = self._tokens
        self._replay: Callable[[], None] | None = None

    def fits(self, model: Any, batch: int, num_tokens: int) -> bool:
        """Whether it serves batch rows of num_tokens tokens, and model's weights stay put."""
        rows, blocks_per_row = self.input.block_table.shape
        is_same_model = model is self._model and _pointers(model) == self._pointers
        return is_same_model and rows == batch and blocks_per_row * PAGE_SIZE >= num_tokens

    def start(
        self, lengths: Sequence[int], params: Sequence[SamplingParams], logits: Tensor
    ) -> Tensor:
        """Takes over from a prefill of rows of these lengths; returns the first token of each.

        logits: [batch, vocab_size], of the last token of each prompt
        """
        step, device = self.input, self.input.block_table.device
        self._sampler.copy_(sampling_tensors(params, device))
        self._offsets.zero_()
        self._active.fill_(1)
        positions = torch.tensor(lengths, dtype=torch.int64, device=device)
        step.positions.copy_(positions)
        step.slot_mapping.copy_(step.block_table[:, 0].long() * PAGE_SIZE + positions)
        step.cache_seqlens.copy_(positions + 1)
        tokens = self._sampler.sample(logits, self._offsets)
        self._tokens.copy_(tokens)
        self._offsets.add_(1)
        return tokens

    def hold(self, ended: Sequence[bool]) -> None:
        """Rows that have ended stay where they are from now on."""
        self._active.copy_(torch.tensor([int(not end) for end in ended]))

    def run(self) -> Tensor:
        """The next token of each row, [batch] int64, overwritten by the next run."""
        if self._replay is not None:
            self._replay()
        elif self._tokens.is_cuda:
            self._capture()
        else:
            self._record()
        return self._next

    def _forward(self) -> None:
        logits = forward_tokens(self._model, self._tokens, self.input, self.state)
        self._next = self._sampler.sample(logits, self._offsets)

    def _advance(self) -> None:
        """The next run's inputs, in place."""
        self._tokens.copy_(self._next)
        self._offsets.add_(self._active)
        self.input.positions.add_(self._active)
        self.input.slot_mapping.add_(self._active)
        self.input.cache_seqlens.add_(self._active)

    def _record(self) -> None:
        try:
            with Recording() as recording:
                self._forward()
        except RecordingError as error:
            _log.info("decoding eagerly: %s", error)
            self._forward()
            self._replay = self._run_eagerly
        else:
            self.mode = "recorded"
            self.recording = recording
            self._replay = self._replay_recording
        self._advance()

    def _replay_recording(self) -> None:
        assert self.recording is not None
        self.recording.replay()
        self._advance()

    def _run_eagerly(self) -> None:
        self._forward()
        self._advance()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        tokens = self._next
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
            self._advance()
        self._next.copy_(tokens)
        self._advance()
        self.mode = "graph"
        self._replay = graph.replay


def _pointers(model: Any) -> list[int]:
    """Where the weights of a model lie: what a recording or a graph has frozen."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
