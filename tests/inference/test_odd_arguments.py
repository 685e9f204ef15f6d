"""What is of another type, odd or out of range ends in a sentence that names the argument."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny_model

from llamatelemetry.inference import BatchInferenceOptimizer
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.kv_cache import KVCache, KVCacheConfig
from llamatelemetry.inference.sampling import GREEDY

SIZES = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "dtype": torch.float32}


@pytest.fixture(scope="module")
def batcher():
    return ContinuousBatching(2, tiny_model("llama", "cpu"), num_blocks=3)


@pytest.mark.parametrize("params", [GREEDY, 3, None, "ab", {}, ()])
def test_params_of_a_group(batcher, params):
    with pytest.raises(ValueError, match="params must"):
        batcher.submit_group([5, 9], params)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shown_tokens": None}, "shown_tokens must be names of tokens, got None"),
        ({"shown_tokens": "<a>"}, "shown_tokens must be names of tokens, got '<a>'"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
    ],
)
def test_options(batcher, options, words):
    with pytest.raises(ValueError, match=words):
        batcher.submit([5, 9], max_tokens=2, **options)
    assert not batcher.active_requests


@pytest.mark.parametrize("timeout", ["1", math.nan, True, 10**400, -(10**400)])
def test_timeouts(batcher, timeout):
    handle = batcher.submit([5, 9], max_tokens=2)
    with pytest.raises(ValueError, match="timeout must be a number"):
        handle.result(timeout)
    assert len(handle.result(math.inf).token_ids) == 2


@pytest.mark.parametrize("beams", [0, -1, 1.5, "2"])
def test_lengths_by_beams(batcher, beams):
    with pytest.raises(ValueError, match="num_beams must be"):
        batcher.max_model_len(beams)
    with pytest.raises(ValueError, match="engine must be given for a max_model_len"):
        ContinuousBatching(2).max_model_len()


def test_more_blocks_than_there_are_numbers():
    with pytest.raises(ValueError, match="num_blocks must be as many as there is memory for"):
        ContinuousBatching(2, tiny_model("llama", "cpu"), num_blocks=10**30)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompts": None}, "prompts must be a list of one for each row"),
        ({"prompts": torch.tensor([[1, 2]])}, "prompts must be a list of one for each row"),
        ({"prompts": [5]}, "prompt must be text or a sequence of token ids, got 5"),
        ({"params": [None]}, "params: one must be SamplingParams, got NoneType"),
        ({"params": [{}]}, "params: one must be SamplingParams, got dict"),
        ({"params": GREEDY}, "params must be a list of one for each row"),
        ({"eos_token_ids": 5}, "eos_token_ids must be a collection of token ids, got int"),
        ({"eos_token_ids": None}, "eos_token_ids must be a collection of token ids, got NoneType"),
        ({"eos_token_ids": "a"}, "eos_token_ids: a token id must be a whole number, got 'a'"),
    ],
)
def test_generator(batcher, wrong, words):
    given = {"prompts": [[5, 9]], "params": [GREEDY], "max_tokens": 2} | wrong
    with pytest.raises(ValueError, match=words):
        TokenGenerator(batcher.model).generate(**given)


@pytest.mark.parametrize("rows", [[0], None, torch.tensor(0), torch.tensor([0.0])])
def test_caches(rows):
    cache = KVCache(KVCacheConfig(max_batch_size=2, max_seq_length=16, **SIZES))
    with pytest.raises(ValueError, match="rows must be an int32 or int64 tensor"):
        cache.reorder(0, rows)
    for layer in (1, -1, "0", None):
        for method, argument in (("reorder", torch.tensor([0])), ("truncate", 0)):
            with pytest.raises(ValueError, match=f"KVCache.{method}: layer_idx must"):
                getattr(cache, method)(layer, argument)
    for device in ("nowhere", []):
        with pytest.raises(ValueError, match="KVCacheConfig: device must be one of torch's"):
            KVCacheConfig(device=device)


@pytest.mark.parametrize("rows", [[5, 0], [-1, 0], [0, 2]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_that_a_layer_does_not_have(rows, dtype):
    cache = KVCache(KVCacheConfig(max_batch_size=3, max_seq_length=16, **SIZES))
    cache.update(0, torch.ones(2, 1, 2, 8), torch.ones(2, 1, 2, 8))
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\), got \["):
        cache.reorder(0, torch.tensor(rows, dtype=dtype))
    cache.reorder(0, torch.tensor([1, 0, 1], dtype=dtype))
    assert cache.get(0)[0].shape[0] == 3


@pytest.mark.parametrize(
    ("given", "kind"), [("xy", "str"), ({"a": 1, "b": 2}, "dict"), (None, "NoneType")]
)
def test_results_that_are_no_list(given, kind):
    """A text of as many letters as there are prompts was one result for each."""

    def answer(prompts: list[str]):
        return given

    with pytest.raises(ValueError, match=f"inference_fn must return a list .* got {kind}"):
        BatchInferenceOptimizer().batch_infer(["a", "b"], answer)


async def answer(prompt):
    return prompt


async def answers(prompt):
    yield prompt


class Answers:
    async def __call__(self, prompts: list[str]):
        return prompts


def several(prompts: list[str]):
    return [answer(prompt) for prompt in prompts]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", [lambda prompt: answer(prompt), answers, Answers(), several])
def test_results_to_be_awaited(function):
    with pytest.raises(ValueError, match="inference_fn must give its results when it is called"):
        BatchInferenceOptimizer().batch_infer(["a"], function)


def test_handles_are_results(batcher):
    """They can be awaited, but need not be."""
    (handle,) = BatchInferenceOptimizer().batch_infer(
        [[5, 9]], lambda ids: batcher.submit(ids, max_tokens=2)
    )
    assert len(handle.result().token_ids) > 0


def test_functions_that_are_none():
    with pytest.raises(ValueError, match="inference_fn must give its results when it is called"):
        BatchInferenceOptimizer().batch_infer(["a", "b"], answer)
    with pytest.raises(ValueError, match="count_tokens must be callable, got 5"):
        BatchInferenceOptimizer(count_tokens=5)
