"""An error between the books and the tensors: the next step computes anew what was not written."""

from __future__ import annotations

import pytest
import torch
from batching import PAGE, PROMPTS, alone, is_free
from families import tiny_model

from llamatelemetry.inference import cache_room, running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.host_pages import HostPages
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.sampling import SamplingParams


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def fail_once(monkeypatch, owner, name, error, when=lambda *args: True):
    """Makes a method raise the first time that it is called with such arguments."""
    method, failed = getattr(owner, name), []

    def failing(self, *args, **options):
        if not failed and when(*args):
            failed.append(1)
            raise error(f"{name} failed")
        return method(self, *args, **options)

    monkeypatch.setattr(owner, name, failing)
    return failed


def change_unseen(model):
    """Of weights, what a fingerprint does not look at."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[0, 1:].add_(3)


@pytest.mark.parametrize(
    ("owner", "name"), [(KvPages, "grow"), (cache_room.Fingerprint, "__init__")]
)
def test_no_prefix_of_other_weights_after_a_growth_that_failed(device, monkeypatch, owner, name):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model)
    prompt = PROMPTS[2]
    before = batcher.submit(prompt, max_tokens=3).result().token_ids
    change_unseen(model)
    failed = fail_once(monkeypatch, owner, name, RuntimeError)
    longer = batcher.submit([1], max_tokens=60)  # room for many, of which it takes few
    batcher.step()
    assert longer.cancel()
    assert failed
    handle = batcher.submit(prompt, max_tokens=3)
    assert handle.result().token_ids == alone(model, prompt, 3) != before
    assert handle.stats.cached_tokens == 0


def test_no_prefix_of_other_weights_after_a_request_without_a_table(device, monkeypatch):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model)
    prompt = PROMPTS[2]
    before = batcher.submit(prompt, max_tokens=3).result().token_ids
    change_unseen(model)

    def no_table(model, num_positions):
        raise ValueError("longrope has no table for so many")

    with monkeypatch.context() as patched:
        patched.setattr("llamatelemetry.inference.runner.rope_tables", no_table)
        with pytest.raises(ValueError, match="longrope has no table for so many"):
            batcher.submit([1] * 100, max_tokens=9).result()
    handle = batcher.submit(prompt, max_tokens=3)
    assert handle.result().token_ids == alone(model, prompt, 3) != before
    assert handle.stats.cached_tokens == 0


def finish(batcher, error):
    """Runs all steps, whatever is raised in between; how often that was."""
    count = 0
    while batcher.active_requests:
        try:
            batcher.run()
        except error:
            count += 1
    return count


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_swap_that_fails_is_computed_again(device, monkeypatch, overlap, error):
    model = tiny_model("llama", device)
    prompts = [[5, 9, 2], [7, 8, 1], [11, 3, 8]]
    batcher = ContinuousBatching(
        3, model, num_blocks=4, num_host_blocks=4, overlap=overlap, share_prefixes=False
    )
    wanted = [alone(model, prompt, 9) for prompt in prompts]
    batcher._batch.scheduler.expected_share = 0.0
    failed = fail_once(monkeypatch, HostPages, "swap", error, lambda plan, _: plan.swaps_out)
    handles = [batcher.submit(prompt, max_tokens=9) for prompt in prompts]
    assert finish(batcher, error) == 1 == len(failed)
    assert [handle.token_ids for handle in handles] == wanted
    assert is_free(batcher)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_copy_of_a_shared_block_that_fails_is_made_up_for(device, monkeypatch, overlap, error):
    model = tiny_model("llama", device)
    params = [SamplingParams(temperature=1.2, seed=seed) for seed in range(2)]
    prompt = PROMPTS[2][:6]
    batcher = ContinuousBatching(3, model, overlap=overlap)
    wanted = [alone(model, prompt, 9, one) for one in params]
    failed = fail_once(monkeypatch, KvPages, "copy_blocks", error, lambda pairs: pairs)
    handles = batcher.submit_group(prompt, params, max_tokens=9)
    assert finish(batcher, error) == 1 == len(failed)
    assert [handle.token_ids for handle in handles] == wanted
    # Nor do others find such blocks by their prefix.
    longer = [*prompt, *wanted[0]]
    assert batcher.submit(longer, max_tokens=5).result().token_ids == alone(model, longer, 5)
    assert is_free(batcher)
