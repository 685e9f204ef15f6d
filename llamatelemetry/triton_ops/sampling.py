"""Choosing the next token as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops.kernels.sampling import draw_kernel, largest_kernel
from llamatelemetry.triton_ops.launch import (
    check,
    check_shape,
    dependent,
    next_power_of_2,
    on_device,
)

_BLOCK = 4096  # logits that a program takes at a time


@torch.library.custom_op("llamatelemetry_triton::sample", mutates_args=())
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    """``llamatelemetry.ops.sample`` in Triton; the same numbers are drawn, and sums of float32 in
    another order may choose a neighbour where a draw falls on the border of two tokens.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    check("sample", "logits", logits)
    batch, vocab_size = logits.shape
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, column in (columns | {"seed": seed, "offset": offset}).items():
        check_shape("sample", name, column, (batch,))
    if vocab_size == 0:
        raise RuntimeError("sample: logits must have at least one column, got 0")
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch:
        block = next_power_of_2(min(vocab_size, _BLOCK), least=16)
        blocks = -(-vocab_size // block)
        largest = torch.empty((batch, blocks), dtype=torch.float32, device=logits.device)
        ids = torch.empty((batch, blocks), dtype=torch.int64, device=logits.device)
        with on_device(logits):
            largest_kernel[(batch, blocks)](
                *(logits, largest, ids, logits.stride(0), vocab_size),
                BLOCK=block,
                num_warps=4,
                **dependent(logits.device),
            )
            draw_kernel[(batch,)](
                *(logits, largest, ids, temperature, top_k, top_p, min_p, seed, offset, out),
                *(logits.stride(0), vocab_size, blocks),
                BLOCK_B=next_power_of_2(blocks),
                BLOCK=block,
                num_warps=8,
                **dependent(logits.device),
            )
    return out


@sample.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
