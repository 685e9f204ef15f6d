"""A model of W8A8 linears by backend="triton": the native path's logits, but for a byte's step."""

from __future__ import annotations

import pytest
import torch
from test_model import prompts_on, text, tiny
from torch import nn

pytest.importorskip("triton")

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.opset import opset_of
from llamatelemetry.models.patching import ops_of, patch, unpatch
from llamatelemetry.profiling.kernels import kernels_of, why_not_only
from llamatelemetry.quantization.w8a8 import W8A8Linear, quantize_w8a8


def in_blocks(model):
    """e4m3 in blocks in the place of the model's linears; gate and up are one block each."""
    for name, part in list(model.named_modules()):
        if type(part) is nn.Linear and name != "lm_head":
            n, k = part.weight.shape
            scales = torch.rand(-(-n // 128), -(-k // 128)) * 0.01
            codes = (torch.randn(n, k) * 10).to(torch.float8_e4m3fn)
            model.set_submodule(name, W8A8Linear(codes, scales, part.bias, 128))
    return model


MAKERS = {
    "int8": lambda: quantize_w8a8(tiny("granite-code", "cpu", num_hidden_layers=1)),
    "fp8": lambda: quantize_w8a8(tiny("granite-code", "cpu", num_hidden_layers=1), "fp8"),
    "blocks": lambda: in_blocks(
        tiny("llama", "cpu", num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_logits_are_the_native_path_s(device, kind):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")
    with torch.inference_mode(False), torch.no_grad():
        model = MAKERS[kind]().to(device)
        ids = torch.arange(6, device=device)[None] * 5
        found = []
        for backend in ("native", "triton"):
            report = patch(model, strict=True, backend=backend)
            assert not report.refused
            assert ops_of(model) is opset_of(backend)
            found.append(model(ids).logits)
            if kind == "int8":  # packed, and steps
                assert all(len(row) == 3 for row in text(model, GREEDY, 2))
            unpatch(model)
        error = (found[0] - found[1]).norm() / found[0].norm()
        assert error < 0.02  # a rounding may move a value by a step of its byte


def test_no_kernel_but_triton_s(device):
    if device.type != "cuda":
        pytest.skip("the interpreter has no kernels to name; needs a device")
    with torch.inference_mode(False), torch.no_grad():
        model = MAKERS["int8"]().to(device).bfloat16()
        patch(model, strict=True, backend="triton")
        generator = TokenGenerator(model)

        def generate():
            list(generator.generate(prompts_on(device), [GREEDY] * 3, 2))

        generate()  # makes the generator's rotary table, by transformers' own code
        assert why_not_only("triton", kernels_of(generate)) is None
