"""Batches within both limits, functions of one prompt, and prompts that fail."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import List  # noqa: UP035

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatelemetry.inference import batch
from llamatelemetry.inference.batch import (
    BatchConfig,
    BatchInferenceOptimizer,
    batch_inference_optimized,
    takes_batches,
)


class Recorder:
    """Takes batches of token ids; remembers them."""

    takes_batches = True

    def __init__(self):
        self.batches = []

    def __call__(self, rows, bad=()):
        self.batches.append([list(row) for row in rows])
        for row in rows:
            if row[0] in bad:
                raise ValueError(f"bad {row[0]}")
        return [sum(row) for row in rows]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=20),
    size=st.integers(1, 5),
    tokens=st.integers(9, 30),
    dynamic=st.booleans(),
)
def test_batches_are_within_both_limits(lengths, size, tokens, dynamic):
    record = Recorder()
    prompts = [[i] * length for i, length in enumerate(lengths)]
    optimizer = BatchInferenceOptimizer(BatchConfig(size, tokens, dynamic))
    assert optimizer.batch_infer(prompts, record) == [sum(prompt) for prompt in prompts]
    for one in record.batches:
        assert len(one) <= size
        assert sum(map(len, one)) <= tokens
    # A batch ends only where the next prompt would not have fitted.
    for one, after in zip(record.batches, record.batches[1:], strict=False):
        assert len(one) == size or sum(map(len, one)) + len(after[0]) > tokens
    flat = [row for one in record.batches for row in one]
    if dynamic:
        assert list(map(len, flat)) == sorted(map(len, flat), reverse=True)
    else:
        assert flat == prompts


def test_a_function_of_one_prompt_is_called_one_by_one():
    seen = []

    def one(prompt, suffix):
        seen.append(prompt)
        return prompt + suffix

    prompts = ["x" * 9000, "b", "c"]
    optimizer = BatchInferenceOptimizer(BatchConfig(max_batch_size=2))
    assert optimizer.batch_infer(prompts, one, suffix="!") == [p + "!" for p in prompts]
    assert seen == prompts
    assert optimizer.batch_infer([], one) == []


def test_which_functions_take_batches():
    def annotated(x: list[str]): ...
    def generic(x: List[str]): ...  # noqa: UP006
    def sequence(x: Sequence[str]): ...
    def of_ids(x: list[int]): ...
    def text(prompts: str): ...
    def named(prompts): ...
    def single(prompt): ...
    def nothing(): ...

    evaluated = eval("lambda x: 0")
    evaluated.__annotations__ = {"x": list[str]}
    ids = eval("lambda prompts: 0")
    ids.__annotations__ = {"prompts": Sequence[int]}
    for function in (annotated, generic, sequence, named, evaluated, Recorder()):
        assert takes_batches(function)
    for function in (of_ids, text, single, nothing, ids, max):
        assert not takes_batches(function)


def test_one_failing_prompt_does_not_lose_the_others():
    record = Recorder()
    optimizer = BatchInferenceOptimizer(BatchConfig(max_batch_size=3))
    with pytest.raises(ValueError, match="bad 2") as caught:
        optimizer.batch_infer([[1], [2], [3], [4], [5]], record, bad=(2, 4))
    assert caught.value.results == [1, None, 3, None, 5]
    assert {i: str(error) for i, error in caught.value.failures.items()} == {1: "bad 2", 3: "bad 4"}

    def one(prompt):
        return 1 / prompt

    with pytest.raises(ZeroDivisionError) as caught:
        optimizer.batch_infer([1, 0, 2], one)
    assert caught.value.results == [1.0, None, 0.5]


def test_a_prompt_over_the_limit_fails_alone():
    record = Recorder()
    optimizer = BatchInferenceOptimizer(BatchConfig(max_tokens=4))
    with pytest.raises(
        ValueError, match=r"at most max_tokens \(4\).*got 5 tokens at index 1"
    ) as caught:
        optimizer.batch_infer([[1], [1] * 5, [2]], record)
    assert caught.value.results == [1, None, 2]


def test_a_function_that_gives_another_number_of_results():
    def fewer(prompts):
        return prompts[1:]

    with pytest.raises(ValueError, match="one result a prompt, got 1 for 2") as caught:
        BatchInferenceOptimizer().batch_infer(["a", "b"], fewer)
    assert caught.value.results == [None, None]


def test_tokens_are_counted_by_who_knows():
    class Engine:
        def encode(self, prompt):
            return list(prompt)

        def infer_batch(self, prompts):
            sizes.append(len(prompts))
            return prompts

    sizes: list[int] = []
    config = BatchConfig(max_tokens=8)
    prompts = ["abcd", "efgh", "ijkl"]
    BatchInferenceOptimizer(config).batch_infer(prompts, Engine().infer_batch)
    assert sizes == [2, 1]

    def plain(prompts):
        sizes.append(len(prompts))
        return prompts

    sizes.clear()
    BatchInferenceOptimizer(config).batch_infer(prompts, plain)  # one token each: 4 bytes
    BatchInferenceOptimizer(config, lambda prompt: 8).batch_infer(prompts, plain)
    assert sizes == [3, 1, 1, 1]


def test_batch_inference_optimized():
    class Model:
        def infer(self, prompt, max_tokens):
            return prompt * max_tokens

        def __call__(self, prompt):
            raise AssertionError

    assert batch_inference_optimized(["a", "b"], Model(), max_tokens=2) == ["aa", "bb"]
    record = Recorder()
    assert batch_inference_optimized([[1]] * 5, record, 2) == [1] * 5
    assert list(map(len, record.batches)) == [2, 2, 1]
    with pytest.raises(ValueError, match="must have a method infer or be callable, got 3"):
        batch_inference_optimized(["a"], 3)


def test_refusals():
    for options, sentence in [
        ({"max_batch_size": 0}, "BatchConfig: max_batch_size must be at least 1, got 0"),
        ({"max_tokens": -1}, "BatchConfig: max_tokens must be at least 1, got -1"),
        ({"max_tokens": 2.5}, "BatchConfig: max_tokens must be a whole number, got 2.5"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            BatchConfig(**options)
    with pytest.raises(ValueError, match="must be a list of prompts, got the one text 'abc'"):
        BatchInferenceOptimizer().batch_infer("abc", print)


def test_examples():
    assert doctest.testmod(batch).failed == 0
    assert doctest.testmod(batch).attempted >= 3
