"""Text in, text out: a local engine over a patched model and its tokenizer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.arguments import instance
from llamatelemetry.inference.defaults import ModelDefaults, UnsetFloat, UnsetInt
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.packed import patch_or_reason
from llamatelemetry.inference.prompts import PromptEncoder, is_a_prompt
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.inference.text_stream import TextStream
from llamatelemetry.loading.find import LoadedModel

# infer's defaults, where neither the call nor the model's generation_config says another.
_TEMPERATURE, _TOP_P, _TOP_K = UnsetFloat(0.7), UnsetFloat(0.9), UnsetInt(40)
_MIN_P, _REPETITION_PENALTY = UnsetFloat(0.0), UnsetFloat(1.0)
# What infer gives back as error_message: bad input, a model or machine that cannot.
_FAILURES = (ValueError, RuntimeError, ArithmeticError, MemoryError)


@dataclass(frozen=True)
class InferResult:
    """What ``InferenceEngine.infer`` returns; on failure text is "" and error_message says why.

    Example:
        >>> InferResult(True, "Elbe", 2, latency_ms=50.0, tokens_per_sec=40.0).error_message is None
        True
    """

    success: bool
    text: str
    tokens_generated: int
    latency_ms: float
    tokens_per_sec: float
    error_message: str | None = None


@dataclass
class GenerationStats:
    """Counts, of all sequences together, and seconds of one generation, filled in as it goes.

    Example:
        >>> GenerationStats(generated_tokens=11, decode_s=2.0).decode_tokens_per_s
        5.0
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_s: float = 0.0  # from the call to the first token
    decode_s: float = 0.0  # from the first token to the last
    sequences: int = 1  # each has a first token, all at the same time

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.first_token_s if self.first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        decoded = self.generated_tokens - self.sequences
        return decoded / self.decode_s if self.decode_s else 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Counts the tokens of a step that ended so many seconds after the call."""
        if self.generated_tokens == 0:
            self.first_token_s = seconds
        self.decode_s = seconds - self.first_token_s
        self.generated_tokens += num_tokens


class InferenceEngine:
    """Generates text with a model that ``load_model`` returned; patches the model.

    A prompt is text, which becomes a user's turn where the model has a chat template, messages
    (mappings with role and content), or token ids. A model that the packed steps do not serve
    generates by transformers' own forward, which a warning says once. What generation_config.json
    asks for holds where a request says no other. Threads share an engine, by turns. Keys and values
    are of cache_dtype, which may be what ContinuousBatching's may, and is not handed on to it.

    Attributes:
        loaded: the LoadedModel that was given; its transformers model is patched in place
        stats: GenerationStats of the generation that began last

    Example:
        >>> engine = InferenceEngine(loaded)  # loaded = load_model("smollm2")
        >>> engine.infer("Name three rivers.", max_tokens=4).tokens_generated
        4

    Raises:
        ValueError: for no LoadedModel, a config's bad numbers, a backend or cache_dtype that fails
    """

    def __init__(
        self, model: LoadedModel, *, backend: str | None = None, cache_dtype: Any = None
    ) -> None:
        instance("InferenceEngine: model", model, LoadedModel, "what load_model returned")
        self.loaded, self.tokenizer = model, model.tokenizer
        self.defaults = ModelDefaults(model.generation)
        self.patch_report, reason = patch_or_reason(model.model, backend, cache_dtype)
        self.generator = TokenGenerator(model.model, reason, cache_dtype)
        self.stats, self.prompts = GenerationStats(), PromptEncoder(model.tokenizer)

    def encode(self, prompt: Any, system_prompt: str | None = None, tools: Any = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: text, messages or token ids. A control token's name in text is its letters
            system_prompt: a system turn before text
            tools: descriptions of functions, for the chat template

        Raises:
            ValueError: for what is no prompt, and what the chat template refuses
        """
        return self.prompts.encode(prompt, system_prompt, tools)

    def stream(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        max_tokens: int = 128,
        stop_sequences: str | Sequence[str] = (),
        *,
        system_prompt: str | None = None,
    ) -> Iterator[str]:
        """Yields text as it comes, until max_tokens, the end of the turn or a stop sequence.

        Args:
            prompt: text, messages, or token ids that go to the model as they are
            params: SamplingParams; None is what the model's generation_config asks for, and greedy
                where it asks for nothing
            stop_sequences: a str is one stop sequence
            system_prompt: a system turn before text

        Raises:
            ValueError: at once, for a prompt that is empty or longer than the context, and for
                arguments of another type, by name
        """
        params = self.defaults.unasked() if params is None else params
        stats = GenerationStats()
        return self._stream(prompt, params, max_tokens, stop_sequences, stats, system_prompt)

    def _stream(
        self,
        prompt: Any,
        params: SamplingParams,
        max_tokens: int,
        stop_sequences: str | Sequence[str] | None,
        stats: GenerationStats,
        system_prompt: str | None,
    ) -> Iterator[str]:
        """Checks all that there is to check, then streams when it is iterated."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {params!r:.80}")
        ids = self.encode(prompt, system_prompt)
        stats.prompt_tokens = len(ids)
        stops = () if stop_sequences is None else stop_sequences
        text = TextStream(self.tokenizer, stops, "stop_sequences")
        steps = self.generator.generate([ids], [params], max_tokens, self.loaded.eos_ids)
        return self._texts(steps, text, stats)

    def _texts(
        self, steps: Iterator[list[int | None]], text: TextStream, stats: GenerationStats
    ) -> Iterator[str]:
        self.stats = stats
        start = time.perf_counter()
        for (token,) in steps:
            stats.add(1, time.perf_counter() - start)
            assert token is not None, "a single row ends with its generation"
            if piece := text.push(token):
                yield piece
            if text.stopped:
                return
        if rest := text.finish():
            yield rest

    def infer(
        self,
        prompt: Any,
        max_tokens: int = 128,
        temperature: float = _TEMPERATURE,
        top_p: float = _TOP_P,
        top_k: int = _TOP_K,
        seed: int = 0,
        stop_sequences: str | Sequence[str] | None = None,
        *,
        min_p: float = _MIN_P,
        repetition_penalty: float = _REPETITION_PENALTY,
        system_prompt: str | None = None,
    ) -> InferResult:
        """Generates and returns the whole text; what goes wrong comes back as error_message.

        Args:
            prompt: text, messages or token ids
            temperature, top_p, top_k, min_p, repetition_penalty: as in SamplingParams; where the
                model's generation_config has one and the call does not, the config's holds
            seed: same seed, same prompt: same text
            stop_sequences: the text ends before the first that appears
            system_prompt: a system turn before text
        """
        start = time.perf_counter()
        stats = GenerationStats()
        try:
            params = self.defaults.filled(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
            asked = prompt, params, max_tokens, stop_sequences
            text = "".join(self._stream(*asked, stats, system_prompt))
        except _FAILURES as error:
            message = str(error) or type(error).__name__
            return InferResult(False, "", 0, _ms_since(start), 0.0, message)
        return InferResult(
            True,
            text,
            stats.generated_tokens,
            _ms_since(start),
            stats.generated_tokens / (time.perf_counter() - start),
        )

    def infer_batch(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | None = None,
        max_tokens: int = 128,
        stop_sequences: str | Sequence[str] = (),
        *,
        system_prompt: str | None = None,
    ) -> list[str]:
        """One text a prompt, decoded together as one ragged batch without padding.

        A prompt that is empty, does not fit the context or that the chat template refuses gives ""
        and a warning with the reason; the others are as they would be without it.

        Args:
            prompts: each as infer's
            params, max_tokens, stop_sequences, system_prompt: as stream's, for all of them

        Raises:
            ValueError: for what is no prompt, arguments of another type, and where no prompt is
                left
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r:.80}")
        prompts, params = list(prompts), self.defaults.unasked() if params is None else params
        texts = [TextStream(self.tokenizer, stop_sequences, "stop_sequences") for _ in prompts]
        rows, kept, failures = [], [], []
        for i, prompt in enumerate(prompts):
            is_a_prompt(prompt)
            try:
                ids = self.encode(prompt, system_prompt)
                self.generator.check([ids], [params], max_tokens)
            except ValueError as error:
                failures.append((i, error))
            else:
                rows.append(ids)
                kept.append(texts[i])
        if failures and not rows:
            raise failures[0][1]
        for i, reason in failures:
            warnings.warn(f"infer_batch: prompts[{i}] gives no text: {reason}", stacklevel=2)
        self._run_batch(rows, kept, params, max_tokens)
        return [text.text for text in texts]

    def _run_batch(
        self,
        rows: Sequence[list[int]],
        texts: Sequence[TextStream],
        params: SamplingParams,
        max_tokens: int,
    ) -> None:
        """Generates for rows of ids into their texts."""
        stats = self.stats = GenerationStats(sum(map(len, rows)), sequences=len(rows))
        if not rows:
            return
        stopped: set[int] = set()
        start = time.perf_counter()
        for tokens in self.generator.generate(
            rows, [params] * len(rows), max_tokens, self.loaded.eos_ids, stopped
        ):
            stats.add(sum(token is not None for token in tokens), time.perf_counter() - start)
            for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                if token is not None:
                    text.push(token)
                if text.stopped:
                    stopped.add(row)
        for text in texts:
            text.finish()


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
