"""Continuous batching: requests join and leave the batch with every token."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from llamatelemetry.inference.arguments import at_least
from llamatelemetry.inference.beam_search import EarlyStopping
from llamatelemetry.inference.kv_pages import check_cache_dtype
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.running_batch import RunningBatch
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.inference.served import check_draft_model, served_by
from llamatelemetry.inference.speculation import Speculation
from llamatelemetry.inference.speculation_config import SpeculationConfig, checked_speculation
from llamatelemetry.inference.step_limits import StepLimits
from llamatelemetry.inference.submission import Submission, several_params
from llamatelemetry.inference.telemetry import Telemetry
from llamatelemetry.inference.turns import Turns
from llamatelemetry.loading.find import context_length_of
from llamatelemetry.models.patching import ops_of


class ContinuousBatching:
    """Generates for many requests at once over one paged cache.

    Each step draws a token for every request at work, more where drafts are right, and prompts are
    computed beside them, in chunks where they are long. Greedy text is what the request gives
    alone, but for near-ties that the rounding of other shapes decides. Threads may share it: a step
    at a time is run, by whoever waits for a result, calls step or run. An exception in one request
    ends that one alone.

    Prefixes of equal tokens are computed once. Weights changed in place are noticed, but for a few
    elements written through ``.data``: call ``forget_prefixes`` then. Steps run in the model's own
    dtype, under autocast too.

    Args:
        max_batch_size: requests at work at once; others wait.
        engine: an InferenceEngine, or a transformers model (patched here) for prompts of token ids.
        max_step_tokens: tokens of one step at most; default 256 on the CPU and 4096 on a GPU.
        prefill_chunk: prompt tokens at most in a step in which others decode, which wait for them;
            default 512 on a GPU and 64 on the CPU, or max_step_tokens where that is less. With
            split_size it must be None, as chunks are the same there whoever else is at work.
        num_blocks: blocks of 64 tokens in the cache. None grows it to what max_batch_size of the
            open requests may need at most; with a number, requests wait for blocks, or give
            theirs up and compute them again.
        share_prefixes: whether later requests use what earlier ones have in the cache.
        num_host_blocks: blocks in the host's memory (pinned beside a GPU), to which the keys and
            values of those that give up their blocks go, as many as find room there, and from which
            they come back, if that takes less time than computing them again; with 0 they are.
        overlap: whether the next step is launched before a step's tokens are looked at, so that a
            GPU does not wait for the host; None does so on a GPU. The text is the same, and step
            gives it one step later; an edit of the model tells one token later too.
        cache_dtype: of keys and values: torch.float8_e4m3fn or torch.int8; for a float32 model on
            the CPU torch.float16 or torch.bfloat16 too; None is the model's own, as its name is.
        split_size: a multiple of 64, at which attention's keys are cut: then no bit of a request's
            tokens depends on the others, but where it gave its blocks up. Steps have max_batch_size
            rows, a prompt a forward of its own, and no prefix is shared; 0 is faster.
        speculation: SpeculationConfig; None drafts nothing. The text is the same but for near-ties.

    Raises:
        ValueError: for a number out of range, another cache_dtype, a model packed steps do not
            serve, more num_blocks or num_host_blocks than there is memory for.

    Attributes:
        max_batch_size: as given.
        active_requests: handles of the requests that have not ended, in order of submission.
        max_step_tokens: as given, or what it stands for; there is none without an engine.

    Example:
        >>> from llamatelemetry.inference import ContinuousBatching
        >>> ContinuousBatching(max_batch_size=4).active_requests
        []

        With an engine::

            batcher = ContinuousBatching(8, InferenceEngine(load_model("smollm2")))
            first, second = (batcher.submit(text, max_tokens=32) for text in ("One", "Two"))
            for piece in first:  # runs the steps of both
                print(piece, end="")
            print(second.result().text, second.stats.ttft)
    """

    def __init__(
        self,
        max_batch_size: int = 8,
        engine: Any = None,
        *,
        max_step_tokens: int | None = None,
        num_blocks: int | None = None,
        share_prefixes: bool = True,
        num_host_blocks: int = 0,
        overlap: bool | None = None,
        cache_dtype: Any = None,
        split_size: int = 0,
        speculation: SpeculationConfig | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        limits = StepLimits(max_batch_size, max_step_tokens, prefill_chunk, split_size)
        if num_blocks is not None:
            at_least("ContinuousBatching: num_blocks", num_blocks, 1)
        at_least("ContinuousBatching: num_host_blocks", num_host_blocks, 0)
        check_cache_dtype(cache_dtype, "ContinuousBatching: ")
        self.max_batch_size, self.engine = max_batch_size, engine
        self._names = itertools.count()
        self._turns: Turns | None = None
        self._fixed_blocks = num_blocks
        if checked_speculation(speculation) is not None and split_size:
            raise ValueError(
                "ContinuousBatching: split_size must be 0 with speculation, whose steps have "
                f"drafted tokens of others too, got {split_size}"
            )
        if engine is None:
            return
        self._served = served_by(engine)
        self.model = self._served.model
        if speculation is not None and speculation.draft_model is not None:
            check_draft_model(speculation.draft_model, self.model)
        if split_size and ops_of(self.model).name == "triton":
            raise ValueError("ContinuousBatching: split_size must be 0 with the Triton backend")
        device = self.model.device.type
        self.max_step_tokens = limits.step_tokens(device)
        overlap = device == "cuda" if overlap is None else overlap
        self._turns = Turns(
            RunningBatch(
                *(self.model, max_batch_size, self.max_step_tokens, num_blocks),
                share_prefixes and not split_size,
                num_host_blocks,
                overlap,
                cache_dtype,
                split_size,
                None if speculation is None else Speculation(speculation, overlap),
                limits.chunk(device),
            )
        )

    @property
    def _batch(self) -> RunningBatch | None:
        return None if self._turns is None else self._turns.batch

    @property
    def active_requests(self) -> list[RequestHandle]:
        opened = [] if self._batch is None else list(self._batch.open.values())
        return [handle for handle in opened if not (handle.done() or handle.is_hidden)]

    @property
    def telemetry(self) -> Telemetry:
        """Telemetry of the steps and requests so far."""
        return Telemetry() if self._turns is None else self._turns.telemetry

    def watch(self) -> Any:
        """A live view of the steps, in a terminal or a notebook's cell: ``with batcher.watch():``.

        Raises:
            ImportError: there is no package rich.
        """
        from llamatelemetry.inference.live_view import live

        return live(self.telemetry)

    @property
    def decode_mode(self) -> str:
        """How the last decode step was run: "recorded" (CPU), "graph" (CUDA) or "eager"."""
        return "eager" if self._batch is None else self._batch.decode_mode

    def max_model_len(self, num_beams: int = 1) -> int:
        """Tokens that a prompt and its answer may have together, by the model's context and by
        num_blocks.

        Args:
            num_beams: as submit_group's.
        """
        at_least("ContinuousBatching: num_beams", num_beams, 1)
        if self._turns is None:
            raise ValueError("ContinuousBatching: engine must be given for a max_model_len")
        context = context_length_of(self.model.config)
        if self._fixed_blocks is None:
            return context
        page_size = self._turns.batch.scheduler.blocks.page_size
        return min(context, self._fixed_blocks // num_beams * page_size)

    def submit(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        max_tokens: int = 128,
        **options: Any,
    ) -> RequestHandle:
        """Queues a request; never waits for a step.

        Args:
            prompt: text, as a user's turn where the model has a chat template, messages, or token
                ids.
            params: SamplingParams; None is what the engine's model asks for in its
                generation_config, and greedy where it asks for nothing.
            max_tokens: tokens drawn at most.
            options: see submit_group.

        Raises:
            ValueError: for an argument of another type or out of range, by name; for a prompt that
                is empty or does not fit the context with max_tokens.
            NeverFits: an OutOfBlocks and a ValueError, for a request that num_blocks can never
                hold.
        """
        return self.submit_group(prompt, [params], max_tokens, **options)[0]

    def submit_group(
        self,
        prompt: Any,
        params: Sequence[SamplingParams | None],
        max_tokens: int = 128,
        *,
        min_tokens: int = 0,
        stop_sequences: str | Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        ignore_eos: bool = False,
        priority: int = 0,
        logits: LogitOptions | None = None,
        time_limit_s: float | None = None,
        wait_limit_s: float | None = None,
        shown_tokens: Collection[str] = (),
        num_beams: int = 1,
        speculate: bool = True,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> list[RequestHandle]:
        """Queues several answers to one prompt, which is computed once and whose blocks they share.

        Args:
            prompt, max_tokens: as submit's.
            params: for each answer, as submit's; another seed gives another text.
            min_tokens: before so many are drawn, none of the tokens that end the text may be.
            stop_sequences: the text ends before the first that appears.
            stop_token_ids: end the text as the model's own end tokens do.
            ignore_eos: whether the model's own end tokens do not.
            priority: lower goes first; among equals, who came first.
            logits: LogitOptions: penalties, biases, log-probabilities, a grammar.
            time_limit_s: seconds from now until which each has to end.
            wait_limit_s: seconds from now until which its first forward has to begin.
            shown_tokens: names of control tokens that the text shows; of others it shows nothing.
            num_beams: above 1 the answers, at most so many, are the best that transformers' search
                of so many beams finds, each of which is a row; their text comes at the end, and
                what ends one ends all. Greedy params, no logits and no stop_sequences then.
            speculate: whether tokens may be drafted for them, where the batch has a speculation;
                the kernels of a step with others' drafts are theirs in any case.
            length_penalty, early_stopping: of beams, as in transformers' generate.

        Raises:
            ValueError: as submit does.
        """
        turns = self._turns
        if turns is None:
            raise ValueError("ContinuousBatching: engine must be given to submit a request")
        several_params(params)
        asked = Submission(
            self._ids(prompt),
            *(max_tokens, min_tokens, stop_sequences, stop_token_ids, ignore_eos, priority),
            *(logits, time_limit_s, wait_limit_s, shown_tokens, num_beams, speculate),
            *(length_penalty, early_stopping),
        )
        count = asked.check_beams(params, self.max_batch_size)
        names = [next(self._names) for _ in range(count)]
        requests = asked.requests(names, self.model, self._served.tokenizer, self._served.eos)
        if self._fixed_blocks is not None:
            turns.batch.scheduler.require_fit(requests[0], num_beams)
        given = [one or self._served.unasked for one in params]
        handles = asked.handles(requests, given, turns.drive, turns.sweep)
        turns.batch.submit(handles)
        return handles[: len(params)]

    def step(self) -> list[RequestHandle]:
        """One step: at most one token more for each request, and its drafted ones that are right.

        Returns:
            Handles of the requests that a forward ran on, or that ended.
        """
        return [] if self._turns is None else self._turns.step()

    def run(self) -> list[RequestHandle]:
        """Steps until no request is open; returns those that ended, in order of submission."""
        ended: dict[int, RequestHandle] = {}
        while self.active_requests:
            ended |= {h.request.arrival: h for h in self.step() if h.done()}
        return [ended[arrival] for arrival in sorted(ended)]

    def forget_prefixes(self) -> None:
        """Shares nothing that is cached now with later requests, as after a change of weights."""
        if self._turns is not None:
            with self._turns.held() as batch:
                batch.scheduler.blocks.forget_prefixes()

    def _ids(self, prompt: Any) -> Any:
        if self._served.tokenizer is not None:
            return self.engine.encode(prompt)
        if isinstance(prompt, str):
            raise ValueError("prompt must be token ids where engine is a model, got text")
        return prompt
