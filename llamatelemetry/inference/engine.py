"""Text in, text out: a local engine over a patched model and its tokenizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.text_stream import TextStream
from llamatelemetry.loading.find import LoadedModel
from llamatelemetry.models.patching import patch


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

    Threads may share it: their generations take turns, a step each, and none changes another's.

    Attributes:
        model: LoadedModel; its transformers model is patched in place
        stats: GenerationStats of the generation that began last

    Example:
        >>> engine = InferenceEngine(loaded)  # loaded = load_model("smollm2")
        >>> engine.infer("Name three rivers.", max_tokens=4).tokens_generated
        4
    """

    def __init__(self, model: LoadedModel) -> None:
        self.loaded = model
        self.tokenizer = model.tokenizer
        self.patch_report = patch(model.model)
        self.generator = TokenGenerator(model.model)
        self.stats = GenerationStats()
        self._encoding = threading.Lock()  # transformers sets up a tokenizer anew for each call

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as a user's turn where the model has a chat template."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, got {prompt!r}")
        with self._encoding:
            if getattr(self.tokenizer, "chat_template", None):
                prompt = self._as_turn(prompt)
                return list(self.tokenizer.encode(prompt, add_special_tokens=False))
            return list(self.tokenizer.encode(prompt))

    def _as_turn(self, prompt: str) -> str:
        from jinja2 import TemplateError

        turn = [{"role": "user", "content": prompt}]
        try:
            return str(
                self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            raise ValueError(f"prompt: the model's chat template refuses it: {error}") from error

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        max_tokens: int = 128,
        stop_sequences: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yields text as it comes, until max_tokens, the end of the turn or a stop sequence.

        Args:
            prompt: text, or token ids that go to the model as they are
            params: SamplingParams; None is greedy
            stop_sequences: a str is one stop sequence

        Raises:
            ValueError: for a prompt that is empty or longer than the context, and for arguments of
                another type, by name
        """
        return self._stream(prompt, params, max_tokens, stop_sequences, GenerationStats())

    def _stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        max_tokens: int,
        stop_sequences: str | Sequence[str],
        stats: GenerationStats,
    ) -> Iterator[str]:
        ids = self.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        stats.prompt_tokens = len(ids)
        self.stats = stats
        text = TextStream(self.tokenizer, stop_sequences, "stop_sequences")
        start = time.perf_counter()
        steps = self.generator.generate([ids], [params or GREEDY], max_tokens, self.loaded.eos_ids)
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
        prompt: str,
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 40,
        seed: int = 0,
        stop_sequences: str | Sequence[str] | None = None,
    ) -> InferResult:
        """Generates and returns the whole text; refused input comes back as error_message."""
        start = time.perf_counter()
        stats = GenerationStats()
        try:
            params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
            stops = () if stop_sequences is None else stop_sequences
            text = "".join(self._stream(prompt, params, max_tokens, stops, stats))
        except ValueError as error:
            return InferResult(False, "", 0, _ms_since(start), 0.0, str(error))
        return InferResult(
            True,
            text,
            stats.generated_tokens,
            _ms_since(start),
            stats.generated_tokens / (time.perf_counter() - start),
        )

    def infer_batch(
        self,
        prompts: Sequence[str],
        params: SamplingParams | None = None,
        max_tokens: int = 128,
    ) -> list[str]:
        """One text a prompt, decoded together as one ragged batch without padding."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got the text {prompts!r}")
        if not prompts:
            return []
        ids = [self.encode(prompt) for prompt in prompts]
        stats = self.stats = GenerationStats(sum(map(len, ids)), sequences=len(ids))
        texts = [TextStream(self.tokenizer) for _ in prompts]
        rows = [params or GREEDY] * len(prompts)
        eos = self.loaded.eos_ids
        start = time.perf_counter()
        for tokens in self.generator.generate(ids, rows, max_tokens, eos):
            stats.add(sum(token is not None for token in tokens), time.perf_counter() - start)
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    text.push(token)
        for text in texts:
            text.finish()
        return [text.text for text in texts]


def token_ids(prompt: Any) -> list[int]:
    """A prompt that is not text, as a list.

    Raises:
        ValueError: for what is no sequence.
    """
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise ValueError(f"prompt must be text or a sequence of token ids, got {prompt!r}")
    return list(prompt)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
