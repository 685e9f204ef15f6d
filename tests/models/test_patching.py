"""A patched transformers model gives what it gave before: logits, tokens, state_dict."""

from __future__ import annotations

import pytest
import torch
from models.families import FAMILIES, VOCAB, tiny_model
from tolerance import assert_within_2x
from transformers import DynamicCache, StaticCache

from llamatelemetry.models.patching import patch

pytestmark = pytest.mark.skipif(
    any(
        not torch._C._dispatch_has_kernel_for_dispatch_key(f"llamatelemetry::{op}", "CPU")
        for op in ("fused_add_rms_norm_", "rotary_embedding_", "silu_and_mul", "paged_attention")
    ),
    reason="its ops are still being built",
)

LENGTHS = (4, 9, 1)
LONGEST = 9


def padded_batch(side, device="cpu"):
    """ids and attention mask [3, LONGEST], rows of LENGTHS tokens padded on one side."""
    ids = torch.randint(VOCAB, (len(LENGTHS), LONGEST), device=device)
    index = torch.arange(LONGEST, device=device)
    lengths = torch.tensor(LENGTHS, device=device).unsqueeze(1)
    mask = index < lengths if side == "right" else index >= LONGEST - lengths
    return ids, mask.long()


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def exact_twin(model, family, device):
    twin = tiny_model(family, device, torch.float64)
    twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return twin


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_logits(family, side, cache, device, dtype):
    ids, mask = padded_batch(side, device)
    model = tiny_model(family, device, dtype)
    twin = exact_twin(model, family, device)

    def logits(model):
        """A prompt of LONGEST slots; where there is a cache, two more tokens one at a time."""
        past = {
            None: lambda: None,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=LONGEST + 5),
        }[cache]()
        outputs, seen, tokens = [], mask, ids
        for _ in range(1 if past is None else 3):
            positions = positions_of(seen)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=seen, position_ids=positions, past_key_values=past)
            outputs.append(out.logits)
            seen = torch.cat([seen, seen.new_ones(len(LENGTHS), 1)], 1)
            tokens = ids[:, :1]
        outputs[0] = outputs[0][mask.bool()]
        return [out.flatten(0, -2) for out in outputs]

    theirs, exact = logits(model), logits(twin)
    patch(model)
    for ours, same_dtype, ref64 in zip(logits(model), theirs, exact, strict=True):
        assert_within_2x(ours, same_dtype, ref64)
