"""Packed weights as whole tensors: dequantise."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import register_fake

# GGML type number: weights and bytes of a block, as csrc/quant/gguf_blocks.h has them.
GGUF_BLOCKS = {
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
}


def dequantize(data: Tensor, format: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of GGUF blocks: ``scale * code - minimum`` in float32, rounded once to dtype.

    data:    [..., row_bytes] uint8, whole blocks of the format; rows contiguous, evenly spaced
    format:  GGML type number: Q4_0 2, Q4_1 3, Q5_0 6, Q5_1 7, Q8_0 8, Q4_K 12, Q5_K 13, Q6_K 14
             (gguf.GGMLQuantizationType is one)
    dtype:   float32, float16 or bfloat16
    Returns: [..., weights in row_bytes] of dtype, contiguous; float32 equals
             gguf.quants.dequantize bit for bit
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  ggml's ggml-common.h and gguf-py's quants.py
    """
    return torch.ops.llamatelemetry.dequantize.default(data, format, dtype)


@register_fake("dequantize")
def _(data: Tensor, format: int, dtype: torch.dtype) -> Tensor:
    weights, num_bytes = GGUF_BLOCKS[format]
    shape = (*data.shape[:-1], data.shape[-1] // num_bytes * weights)
    return data.new_empty(shape, dtype=dtype)
