"""Linear layers in Triton: any size, biases, gates, parts of k."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck
from torch.nn import functional

pytest.importorskip("triton")

from llamatelemetry.triton_ops import attention, gemm
from llamatelemetry.triton_ops.launch import has_tma
from llamatelemetry.triton_ops.tuning import (
    FOLDER,
    LinearConfig,
    LinearShape,
    shared_bytes_of,
    start_value,
    table_of,
    tma_value,
)

SIZES = [(1, 1, 1), (2, 48, 32), (3, 17, 127), (16, 64, 256), (33, 80, 96), (70, 130, 200)]


def weights(m, n, k, device, dtype):
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype)


def in_steps(x, weight, bias, activation=None):
    """Sums in float32, rounded as the op says."""
    out = x.float() @ weight.float().t()
    out = (out if bias is None else out + bias.float()).to(x.dtype)
    if activation is None:
        return out
    gate, up = out.chunk(2, -1)
    return functional.silu(gate.float()).to(x.dtype) * up


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(device, dtype, m, n, k, has_bias):
    x, weight, bias = weights(m, n, k, device, dtype)
    bias = bias if has_bias else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert_close(gemm.linear(x, weight, bias), in_steps(x, weight, bias), exact)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_gated_linear(device, dtype, m, n, k):
    x, weight, bias = weights(m, 2 * n, k, device, dtype)
    gate, up = (x.double() @ weight.double().t() + bias.double()).chunk(2, -1)
    out, exact = gemm.linear(x, weight, bias, "silu"), functional.silu(gate) * up
    if dtype == torch.float32:
        # Beside the rule's: a GPU's fast exponential and quotient may each be off by two units.
        theirs = (in_steps(x, weight, bias, "silu").double() - exact).abs().max()
        units = torch.finfo(dtype).eps * exact.abs().max()
        assert (out.double() - exact).abs().max() <= 2 * theirs + 5 * units
    else:
        assert_close(out, in_steps(x, weight, bias, "silu"), exact)


def test_long_sums_in_float32_are_as_exact_as_torch_s(device):
    """One product after another would lose a digit of 4096: tiles are summed, then added."""
    x, weight, _ = weights(5, 40, 4096, device, torch.float32)
    exact = x.double() @ weight.double().t()
    assert_close(gemm.linear(x, weight), x @ weight.t(), exact)


@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_parts_of_k(device, splits, activation):
    x, weight, bias = weights(3, 70, 200, device, torch.float32)
    config = LinearConfig(16, 32, 32, splits, 8, 4, 2)
    out = x.new_empty(3, 70 if activation is None else 35)
    gemm.run(x, weight, bias, activation, out, config)
    torch.testing.assert_close(out, in_steps(x, weight, bias, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("m", "k"), [(70, 96), (33, 72), (20, 50)])
@pytest.mark.parametrize("programs", [0, 5, 7])
def test_tiles_read_by_descriptors(device, monkeypatch, m, k, activation, programs):
    """Where rows begin at 16 bytes; of others by pointers. Whole tiles, and even shares of k."""
    monkeypatch.setattr(gemm, "num_multiprocessors", lambda device: 1)
    if device.type == "cuda" and not has_tma(device):
        pytest.skip("needs a GPU with descriptors")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, bias = weights(m, 80, k, device, dtype)
    config = LinearConfig(32, 32, 32, 1, 2, 4, 2, tma=True, stream=programs)
    out = x.new_empty(m, 80 if activation is None else 40)
    gemm.run(x, weight, bias, activation, out, config)
    by_pointers = torch.empty_like(out)
    gemm.run(x, weight, bias, activation, by_pointers, replace(config, tma=False))
    limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, by_pointers, **limit)
    again = torch.empty_like(out)
    gemm.run(x, weight, bias, activation, again, config)
    assert torch.equal(out, again)


@pytest.mark.without_triton
def test_launches_of_descriptors_fit_in_shared_memory():
    for m, n, gated in product((512, 4096), (64, 4096, 128256), (False, True)):
        shape = LinearShape.of(m, n, 4096, gated)
        config = tma_value(shape, 132)
        assert config.tma
        assert shared_bytes_of(config, shape, 2) <= 227 * 1024


def test_rows_that_lie_apart(device):
    x, weight, _ = weights(4, 32, 64, device, torch.float32)
    apart = torch.cat([x, x], 1)[:, :64]
    assert torch.equal(gemm.linear(apart, weight), gemm.linear(x, weight))
    assert gemm.linear(x.view(2, 2, 64), weight).shape == (2, 2, 32)
    assert gemm.linear(x[:0], weight).shape == (0, 32)


def test_opcheck(device):
    x, weight, bias = weights(3, 32, 48, device, torch.float32)
    opcheck(torch.ops.llamatelemetry_triton.linear.default, (x, weight, bias, None))
    opcheck(torch.ops.llamatelemetry_triton.linear.default, (x, weight, None, "silu"))


def test_refuses(device):
    x, weight, bias = weights(3, 33, 48, device, torch.float32)
    assert_refuses(lambda: gemm.linear(x, weight[:, :5]), "weight", "[33, 48]", "[33, 5]")
    assert_refuses(lambda: gemm.linear(x, weight, bias[:3]), "bias", "[33]", "[3]")
    assert_refuses(lambda: gemm.linear(x, weight, None, "silu"), "even", "33")
    assert_refuses(lambda: gemm.linear(x, weight, None, "relu"), "activation", "'relu'")
    assert_refuses(lambda: gemm.linear(x, weight.half()), "weight", "float16")


GPUS = {"sm90": (132, 227), "sm80": (108, 163), "sm86": (82, 99), "sm75": (40, 64)}


@pytest.mark.without_triton
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("m", [1, 16, 17, 100, 5000])
def test_start_values_are_launches(m, gpu):
    """Powers of two, tiles that fit in shared memory, and k split into parts that hold some."""
    multiprocessors, kibibytes = GPUS[gpu]
    for n, gated, size in product((16, 4096, 128256), (False, True), (2, 4)):
        shape = LinearShape.of(m, n, 4096, gated)
        config = start_value(shape, size, multiprocessors, kibibytes * 1024)
        tile = (config.block_m + config.block_n * (2 if gated else 1)) * config.block_k * size
        assert tile * config.num_stages <= kibibytes * 1024
        assert config.num_stages >= 2
        assert config.splits * 512 <= 4096
        for side in (config.block_m, config.block_n, config.block_k):
            assert side >= 16
            assert side & (side - 1) == 0


@pytest.mark.without_triton
@pytest.mark.parametrize("gpu", ["sm80", "sm75"])
def test_shipped_start_values_are_marked_and_are_those(gpu):
    text = (FOLDER / f"{gpu}.json").read_text()
    assert json.loads(text)["measured_on"] is None
    assert json.loads(text)["untuned"]
    multiprocessors, kibibytes = GPUS[gpu]
    for (shape, dtype), config in table_of(text, gpu).items():
        assert dtype == "16-bit"
        assert config == start_value(shape, 2, multiprocessors, kibibytes * 1024)


@pytest.mark.without_triton
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_s_tiles_fit_in_shared_memory(monkeypatch, gpu, head_dim):
    monkeypatch.setattr(attention, "shared_bytes_per_program", lambda _: GPUS[gpu][1] * 1024)
    for rows, dtype in product((1, 40, 4096), (torch.float32, torch.bfloat16)):
        x = torch.empty(1, 1, head_dim, dtype=dtype)
        config = attention.attention_config(rows, 8, 4096, x, may_split=rows < 64)
        held = config.block_m + 2 * config.block_n * config.num_stages
        assert held * head_dim * dtype.itemsize <= GPUS[gpu][1] * 1024
        assert min(config.block_m, config.block_n) >= 16
