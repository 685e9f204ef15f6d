"""csrc/attention/choice.h for GPUs that need not be here: what serves which call."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry._native.facts import ATTENTION_BACKENDS
from llamatelemetry.ops.backends import attention_choice, flash_why_not

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        (75, FP16, "sm75, large tiles"),
        (75, FP32, "simt, rows"),
        (75, BF16, "none"),
        (80, BF16, "sm80, tiles for little shared memory"),
        (86, BF16, "sm80, tiles for little shared memory"),
        (90, FP16, "sm90, large tiles"),
        (90, FP32, "simt, rows"),
        (100, FP16, "sm80, large tiles"),
    ],
)
def test_dense(capability, dtype, chosen):
    assert attention_choice("flash_attn", dtype, capability=capability) == chosen


def test_two_blocks_of_large_tiles_fit_an_a100_up_to_64_columns():
    chosen = attention_choice("flash_attn", BF16, capability=80, head_dim=64)
    assert chosen == "sm80, large tiles"


@pytest.mark.parametrize(
    ("head_dim", "seqlen_k", "tiles"),
    [
        (64, 2048, "tiles for few keys"),
        (64, 2049, "large tiles"),
        (96, 512, "large tiles"),
        (128, 1024, "tiles for few keys"),
        (128, 1025, "large tiles"),
        (256, 0, "large tiles"),
    ],
)
def test_few_keys_on_hopper(head_dim, seqlen_k, tiles):
    sizes = {"head_dim": head_dim, "seqlen_k": seqlen_k}
    assert attention_choice("flash_attn", FP16, capability=90, **sizes) == f"sm90, {tiles}"


BY_PAGE_SIZE = {1: "sm80", 4: "sm80", 8: "sm90", 16: "sm90", 48: "sm80", 64: "sm90", 96: "sm80"}
BY_PAGE_SIZE |= {128: "sm90", 256: "sm90", 200: "sm80", 2048: "sm90"}


@pytest.mark.parametrize(("page_size", "chosen"), BY_PAGE_SIZE.items())
def test_pages_on_hopper(page_size, chosen):
    options = {"seqlen_q": 65, "page_size": page_size, "capability": 90}
    assert attention_choice("paged_attention", FP16, **options) == f"{chosen}, tiles for pages"


def test_a_single_page_of_any_size_on_hopper():
    options = {"seqlen_q": 65, "page_size": 77, "seqlen_k": 77, "capability": 90}
    assert attention_choice("paged_attention", BF16, **options) == "sm90, tiles for pages"


@pytest.mark.parametrize(
    ("capability", "dtype", "seqlen_q", "chosen"),
    [
        (90, FP16, 64, "decode"),
        (90, FP16, 65, "sm90"),
        (90, FP32, 64, "simt"),
        (80, BF16, 64, "decode"),
        (80, BF16, 65, "sm80"),
        (75, FP16, 1, "decode_sm75"),
        (75, FP16, 64, "decode_sm75"),
        (75, FP16, 300, "decode_sm75"),
        (75, BF16, 64, "simt"),
    ],
)
def test_prefill_over_pages(capability, dtype, seqlen_q, chosen):
    choice = attention_choice("paged_attention", dtype, seqlen_q=seqlen_q, capability=capability)
    assert choice.partition(",")[0] == chosen


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "reason"),
    [
        ("decode_sm75", FP16, 75, None),
        ("decode_sm75", BF16, 75, "it serves float16"),
        ("decode_sm75", FP32, 90, "it serves float16"),
        ("decode", FP16, 75, "it needs a GPU of compute capability 8.0 or later and code for it"),
        ("decode", FP32, 90, "it serves float16 and bfloat16"),
    ],
)
def test_what_decode_refuses(name, dtype, capability, reason):
    assert flash_why_not(name, dtype, page_size=16, capability=capability) == reason


def test_counts_past_what_a_kernel_takes():
    """What Hopper's kernel cannot count the next one serves; past every grid nobody does."""
    options = {"capability": 90, "seqlen_k": 64}
    assert attention_choice("flash_attn", FP16, seqlen_q=2**30 - 64, **options)[:4] == "sm90"
    assert attention_choice("flash_attn", FP16, seqlen_q=2**30 - 63, **options)[:4] == "sm80"
    assert attention_choice("flash_attn", FP16, seqlen_q=2**38, **options) == "none"
    assert attention_choice("flash_attn", FP32, seqlen_q=2**31 - 1, **options)[:4] == "simt"
    assert attention_choice("flash_attn", FP32, seqlen_q=2**31, **options) == "none"


def test_splits_on_the_cpu():
    def ask(seqlen_q, seqlen_k):
        sizes = {"device": "cpu", "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        return attention_choice("paged_attention", FP32, **sizes)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert ask(1, 63) == ask(1, 127) == "cpu, rows"
        assert ask(1, 130) == "cpu, rows, 2 splits"
        assert ask(16, 4096) == "cpu, rows, 4 splits"
        assert ask(17, 4096) == "cpu, large tiles"
    finally:
        torch.set_num_threads(threads)
    dense = attention_choice("flash_attn", FP32, device="cpu", seqlen_q=1, seqlen_k=4096)
    assert dense == "cpu, rows"


def test_names():
    names = ["cpu", "decode", "decode_sm75", "sm75", "sm80", "sm90", "simt"]
    assert names == ATTENTION_BACKENDS
    assert flash_why_not("cpu", FP16) is None
