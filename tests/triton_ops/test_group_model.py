"""A model of packed linears by backend="triton": the text of its weights expanded."""

from __future__ import annotations

import copy

import pytest
import torch
from test_model import text, tiny

pytest.importorskip("triton")

from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.opset import opset_of
from llamatelemetry.models.patching import ops_of, patch
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.groups import pack_groups
from llamatelemetry.quantization.modules import expand


def packed(linear, format):
    """A linear of random codes, groups of 32 columns, in the place of torch's."""
    n, k = linear.weight.shape
    low, high, dtype = {
        "U4": (0, 16, torch.uint8),
        "E4M3": (-8, 8, torch.float8_e4m3fn),
    }[format]
    codes = torch.randint(low, high, (n, k)).to(dtype)
    scales = torch.rand(n, k // 32) / k**0.5 / 4
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8) if format == "U4" else None
    perm = torch.randperm(k, dtype=torch.int32) if k > n else None  # down_proj's
    return GroupLinear(pack_groups(codes, format, scales, zeros), k, n, linear.bias, perm)


def with_packed_linears(device, format):
    model = tiny("granite-code", "cpu", num_hidden_layers=1)
    for name, module in list(model.model.named_modules()):
        if type(module) is torch.nn.Linear:
            model.model.set_submodule(name, packed(module, format))
    return model.to(device)


def test_greedy_text_is_that_of_the_weights_expanded(device):
    with torch.inference_mode(False):
        model = with_packed_linears(device, "U4")
        dense = copy.deepcopy(model)
        expand(dense, torch.float32)
        patch(dense, strict=True)
        report = patch(model, strict=True, backend="triton")
        assert ops_of(model) is opset_of("triton")
        assert set(report.replaced) == {"RmsNorm", "Attention", "GatedMlp", "DecoderLayer"}
        assert text(model, GREEDY, 2) == text(dense, GREEDY, 2)


def test_refuses_codes_that_it_has_no_kernel_of(device):
    with torch.inference_mode(False):
        model = with_packed_linears(device, "E4M3")
        with pytest.raises(ValueError, match="GroupLinear of U4, S4, S8, got GroupLinear of E4M3"):
            patch(model, strict=True, backend="triton")
