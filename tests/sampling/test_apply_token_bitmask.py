"""apply_token_bitmask_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import apply_token_bitmask_, reference


def words(batch, vocab_size, device, seed=0):
    made = torch.Generator().manual_seed(seed)
    shape = (batch, -(-vocab_size // 32))
    return torch.randint(-(2**31), 2**31, shape, generator=made).int().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (3, 33), (2, 1003), (5, 49152)])
def test_reference(device, dtype, shape):
    logits = torch.randn(*shape, device=device).to(dtype)
    mask = words(*shape, device)
    wanted = logits.clone()
    reference.apply_token_bitmask_(wanted, mask)
    apply_token_bitmask_(logits, mask)
    assert torch.equal(logits, wanted)


def test_a_bit_is_a_token(device):
    logits = torch.zeros(2, 70, device=device)
    mask = torch.tensor([[-1, -1, -1], [1 << 5, -(2**31), 2]], dtype=torch.int32, device=device)
    apply_token_bitmask_(logits, mask)
    assert (logits[0] == 0).all()
    assert logits[1].isfinite().nonzero().flatten().tolist() == [5, 63, 65]


def test_nan_and_infinity_that_are_allowed_stay(device):
    logits = torch.tensor([[float("nan"), float("inf"), 1.0]], device=device)
    apply_token_bitmask_(logits, torch.tensor([[3]], dtype=torch.int32, device=device))
    assert logits[0, 0].isnan()
    assert logits[0, 1:].tolist() == [float("inf"), -float("inf")]


def test_rows_apart_and_empty(device):
    whole = torch.randn(3, 100, device=device)
    masks = words(3, 96 * 2, device)
    view, wanted = whole[:, 2:66], whole.clone()
    reference.apply_token_bitmask_(wanted[:, 2:66], masks[:, 1:3])
    apply_token_bitmask_(view, masks[:, 1:3])
    assert torch.equal(whole, wanted)
    apply_token_bitmask_(whole[:0], masks[:0, :4])


def test_refusals(device):
    logits = torch.zeros(2, 40, device=device)
    mask = words(2, 40, device)
    for bad, parts in {
        "logits dtype": ((logits.double(), mask), ("logits", "float64")),
        "logits dim": ((logits[0], mask), ("logits", "[batch, vocab_size]")),
        "stride": ((logits.t(), words(40, 2, device)), ("logits", "contiguous")),
        "overlap": ((logits[:1].expand(2, 40), mask), ("logits", "overlap")),
        "words": ((logits, mask[:, :1]), ("bitmask", "[2, 2]")),
        "rows": ((logits, mask[:1]), ("bitmask", "[2, 2]")),
        "mask dtype": ((logits, mask.long()), ("bitmask", "int32", "int64")),
    }.values():
        assert_refuses(lambda bad=bad: apply_token_bitmask_(*bad), "apply_token_bitmask_", *parts)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(2, 40, device=device, requires_grad=True)
        assert_refuses(lambda: apply_token_bitmask_(leaf, mask), "logits", "require grad")


def test_opcheck(device):
    run_opcheck("apply_token_bitmask_", torch.randn(3, 77, device=device), words(3, 77, device))


def test_replay(device):
    first, second = (
        (torch.randn(3, 1003, device=device), words(3, 1003, device, seed)) for seed in (1, 2)
    )
    assert_replays(apply_token_bitmask_, first, second)


def test_compile(device):
    sizes = [(2, 70), (3, 1003), (5, 333)]
    assert_compiles(
        lambda logits, mask: apply_token_bitmask_(logits, mask),
        [(torch.randn(*size, device=device), words(*size, device)) for size in sizes],
    )
