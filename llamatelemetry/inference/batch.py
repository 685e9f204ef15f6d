"""Many prompts at once: lists of them in batches within limits, and requests that come and go."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamatelemetry.inference.arguments import instance, integer
from llamatelemetry.inference.continuous import ContinuousBatching as ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine as InferenceEngine
from llamatelemetry.inference.engine import InferResult as InferResult

# Names of a function's first parameter that say that it takes a list.
_PLURAL = {"prompts", "batch", "inputs", "texts", "requests", "batch_prompts"}
BYTES_PER_TOKEN = 4  # of text for which nothing counts tokens: what English takes on the average


@dataclass
class BatchConfig:
    """Limits of a batch.

    Attributes:
        max_batch_size: prompts in one call at most.
        max_tokens: prompt tokens in one call at most, of all its prompts together. Of a function
            that takes batches, a prompt that has more by itself fails.
        dynamic_batching: whether prompts of like length go together, which fills batches up to
            both limits; else neighbours do, in the order given.

    Raises:
        ValueError: a limit below 1.

    Example:
        >>> BatchConfig(max_batch_size=4)
        BatchConfig(max_batch_size=4, max_tokens=2048, dynamic_batching=True)
    """

    max_batch_size: int = 8
    max_tokens: int = 2048
    dynamic_batching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_tokens"):
            if integer(f"BatchConfig: {name}", getattr(self, name)) < 1:
                value = getattr(self, name)
                raise ValueError(f"BatchConfig: {name} must be at least 1, got {value}")


class BatchInferenceOptimizer:
    """Runs a function over many prompts, in batches where it takes a list.

    Args:
        config: BatchConfig; None is the default one.
        count_tokens: prompt -> its tokens. None counts what is in a prompt of token ids, asks the
            tokenizer of the function's object (an InferenceEngine's infer_batch has one), and takes
            a token for every 4 bytes of any other text, rounded up.

    Example:
        >>> def shout(prompts: list[str]) -> list[str]:
        ...     return [prompt.upper() for prompt in prompts]
        >>> BatchInferenceOptimizer(BatchConfig(max_batch_size=2)).batch_infer(["a", "bc"], shout)
        ['A', 'BC']
    """

    def __init__(
        self,
        config: BatchConfig | None = None,
        count_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        self.config = BatchConfig() if config is None else config
        instance("BatchInferenceOptimizer: config", self.config, BatchConfig, "a BatchConfig")
        if count_tokens is not None and not callable(count_tokens):
            raise ValueError(
                f"BatchInferenceOptimizer: count_tokens must be callable, got {count_tokens!r:.80}"
            )
        self._count_tokens = count_tokens

    def batch_infer(
        self, prompts: Sequence[Any], inference_fn: Callable[..., Any], **kwargs: Any
    ) -> list[Any]:
        """Results in the order of the prompts.

        Args:
            prompts: texts or sequences of token ids.
            inference_fn: takes a list of prompts and returns a list of results, if its first
                parameter is annotated as a list or sequence (but not of int, which is one prompt)
                or, without annotation, is called prompts, batch, inputs, texts, requests or
                batch_prompts; an attribute ``takes_batches`` of the function, True or False, says
                so outright. A batch that raises is tried again prompt by prompt. Any other function
                takes one prompt and is called one by one, without limits.
            kwargs: handed on to each call.

        Raises:
            ValueError: prompts is one text; inference_fn is not callable, or asynchronous; a prompt
                has more tokens than a batch may have; of a list the number of results is another.
            Exception: what the first prompt that failed has raised, once all the others are done.
                Its ``results`` holds theirs in order, with None for those that failed, and its
                ``failures`` the exception of each index that failed.
        """
        if isinstance(prompts, (str, bytes)):
            raise ValueError(f"prompts must be a list of prompts, got the one text {prompts!r}")
        instance("prompts", prompts, Iterable, "a list of prompts")
        if not callable(inference_fn):
            raise ValueError(f"inference_fn must be callable, got {inference_fn!r}")
        if inspect.iscoroutinefunction(inference_fn):
            raise _awaited(inference_fn)
        prompts = list(prompts)
        results: list[Any] = [None] * len(prompts)
        failures: dict[int, Exception] = {}
        if not takes_batches(inference_fn):
            everything = range(len(prompts))
            _one_by_one(everything, prompts, results, failures, lambda p: inference_fn(p, **kwargs))
        else:
            for batch in self._batches(prompts, inference_fn, failures):
                _together(
                    batch,
                    prompts,
                    results,
                    failures,
                    lambda several: inference_fn(several, **kwargs),
                )
        if failures:
            raise _with_results(failures[min(failures)], results, failures)
        return results

    def _batches(
        self,
        prompts: list[Any],
        inference_fn: Callable[..., Any],
        failures: dict[int, Exception],
    ) -> Iterator[list[int]]:
        """Indices of the prompts of each batch; prompts that fit in none are failures."""
        config = self.config
        sizes = {}
        for i, prompt in enumerate(prompts):
            try:
                sizes[i] = self._tokens_of(prompt, inference_fn)
                if sizes[i] > config.max_tokens:
                    raise ValueError(
                        f"prompts: each must have at most max_tokens ({config.max_tokens}) of "
                        f"BatchConfig, got {sizes[i]} tokens at index {i}"
                    )
            except Exception as error:
                failures[i] = error
        order = [i for i in sizes if i not in failures]
        if config.dynamic_batching:
            order.sort(key=lambda i: -sizes[i])
        batch: list[int] = []
        for i in order:
            full = len(batch) == config.max_batch_size
            if full or sum(sizes[k] for k in batch) + sizes[i] > config.max_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _tokens_of(self, prompt: Any, inference_fn: Callable[..., Any]) -> int:
        if self._count_tokens is not None:
            return integer("count_tokens: its result", self._count_tokens(prompt))
        if not isinstance(prompt, str):
            return len(prompt) if hasattr(prompt, "__len__") else 1
        encode = getattr(getattr(inference_fn, "__self__", None), "encode", None)
        if callable(encode):
            return len(encode(prompt))
        return -(-len(prompt.encode()) // BYTES_PER_TOKEN)


def batch_inference_optimized(
    prompts: Sequence[Any], model: Any, max_batch_size: int = 8, **kwargs: Any
) -> list[Any]:
    """Results of a model for many prompts, in their order.

    Args:
        prompts: texts or sequences of token ids.
        model: its ``infer`` method is called if it has one, else the model itself; with lists, if
            it takes them (see ``BatchInferenceOptimizer.batch_infer``).
        max_batch_size: prompts in one call at most; how long they are has no limit here.
        kwargs: handed on to each call.

    Raises:
        ValueError: a model that has no infer and is not callable.
        Exception: as batch_infer.

    Example:
        >>> batch_inference_optimized(["a", "b"], lambda prompt, times: prompt * times, times=3)
        ['aaa', 'bbb']
    """
    call = getattr(model, "infer", None)
    if not callable(call):
        call = model
    if not callable(call):
        raise ValueError(f"model must have a method infer or be callable, got {model!r}")
    config = BatchConfig(max_batch_size, max_tokens=sys.maxsize)
    return BatchInferenceOptimizer(config).batch_infer(prompts, call, **kwargs)


def takes_batches(function: Callable[..., Any]) -> bool:
    """Whether a function takes a list of prompts; see ``BatchInferenceOptimizer.batch_infer``."""
    said = getattr(function, "takes_batches", None)
    if isinstance(said, bool):
        return said
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of something that is not written in Python
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = next((p for p in signature.parameters.values() if p.kind in positional), None)
    if first is None:
        return False
    kind = first.annotation
    if kind is inspect.Parameter.empty:
        return first.name in _PLURAL
    # As it stands in a module that postpones annotations, or as typing writes it.
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", "") + _arguments(kind)
    name, _, rest = text.partition("[")
    return name.split(".")[-1] in ("list", "List", "Sequence") and rest.rstrip("]") != "int"


def _arguments(kind: Any) -> str:
    names = (getattr(one, "__name__", str(one)) for one in typing.get_args(kind))
    return "[" + ", ".join(names) + "]"


class _WrongResult(ValueError):
    pass


def _awaited(what: Any) -> _WrongResult:
    return _WrongResult(
        f"inference_fn must give its results when it is called, got {what!r:.80}, to be awaited"
    )


def _given(result: Any) -> Any:
    """A result, refused where it is a coroutine or an asynchronous generator. Handles of requests
    can be awaited, and are results."""
    if inspect.iscoroutine(result):
        result.close()  # or Python would warn that nobody awaited it
    if inspect.iscoroutine(result) or inspect.isasyncgen(result):
        raise _awaited(result)
    return result


def _together(
    batch: list[int],
    prompts: list[Any],
    results: list[Any],
    failures: dict[int, Exception],
    call: Callable[[list[Any]], Any],
) -> None:
    """One call for all prompts of a batch; where it raises, one for each."""

    def checked(several: list[Any]) -> list[Any]:
        given = _given(call(several))
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise _WrongResult(
                "inference_fn must return a list of one result a prompt, got "
                f"{type(given).__name__}"
            )
        found = [_given(result) for result in given]
        if len(found) != len(several):
            raise _WrongResult(
                f"inference_fn must return one result a prompt, got {len(found)} for {len(several)}"
            )
        return found

    try:
        found = checked([prompts[i] for i in batch])
    except _WrongResult as error:
        failures |= dict.fromkeys(batch, error)
    except Exception:
        _one_by_one(batch, prompts, results, failures, lambda prompt: checked([prompt])[0])
    else:
        for i, result in zip(batch, found, strict=True):
            results[i] = result


def _one_by_one(
    batch: Iterable[int],
    prompts: list[Any],
    results: list[Any],
    failures: dict[int, Exception],
    call: Callable[[Any], Any],
) -> None:
    for i in batch:
        try:
            results[i] = _given(call(prompts[i]))
        except Exception as error:
            failures[i] = error


def _with_results(
    error: Exception, results: list[Any], failures: dict[int, Exception]
) -> Exception:
    error.results, error.failures = results, failures  # type: ignore[attr-defined]
    return error
