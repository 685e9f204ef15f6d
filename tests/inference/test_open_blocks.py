"""Blocks of a model that has changed are not shared."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from test_open_changes import COUNT, PROMPT, _other_eps, stepwise, twins

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.models.patching import patch


def test_a_block_that_two_models_have_filled_is_not_shared():
    plain, ours = twins()
    prompt = (PROMPT * 9)[:100]
    batcher = ContinuousBatching(2, ours)
    first = prompt[:60]  # fills its block of 64 after the change
    handle = batcher.submit(first, max_tokens=COUNT)
    while handle.request.num_drawn < 2:
        batcher.step()
    _other_eps(plain), _other_eps(ours)
    batcher.submit([5, 6, 7], max_tokens=2).result()
    prompt = first + handle.result().token_ids + [4, 5]
    handle = batcher.submit(prompt, max_tokens=COUNT)
    assert handle.result().token_ids == stepwise(plain, prompt=prompt)
    assert handle.stats.cached_tokens == 0


@pytest.mark.filterwarnings("ignore")
def test_a_block_of_another_adapter_is_not_shared():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["k_proj", "v_proj"])
    model = tiny_model("llama")
    with torch.inference_mode(False):
        adapted = peft.get_peft_model(model, config).eval()
        adapted.add_adapter("second", config)
    patch(model)
    batcher = ContinuousBatching(2, model)
    prompt = (PROMPT * 9)[:100]

    def ours():
        return batcher.submit(prompt, max_tokens=COUNT).result().token_ids

    first = ours()
    assert first == stepwise(model, prompt=prompt)
    with adapted.disable_adapter():
        assert ours() == stepwise(model, prompt=prompt) != first
    adapted.set_adapter("second")
    assert ours() == stepwise(model, prompt=prompt) != first
