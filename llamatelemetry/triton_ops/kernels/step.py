"""The host's part of a decode step, on the device: where each row's next token goes."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.dependent import begin


@triton.jit
def advance_kernel(
    ids_ptr,  # [batch] int64, as all that follow but for the block table
    positions_ptr,
    slots_ptr,
    seqlens_ptr,  # [batch] int32
    offsets_ptr,
    next_ids_ptr,
    active_ptr,  # [batch] bool
    table_ptr,  # [batch, max_blocks] int32
    table_stride,
    max_blocks,
    page_size,
    batch,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < batch
    position = tl.load(positions_ptr + rows, mask=mask, other=0)
    after = position + 1
    column = after // page_size
    known = mask & (after >= 0) & (column < max_blocks)
    block = tl.load(table_ptr + rows * table_stride + column, mask=known, other=-1).to(tl.int64)
    is_active = tl.load(active_ptr + rows, mask=mask, other=0) != 0
    goes_on = known & (block >= 0) & is_active
    slot = tl.where(goes_on, block * page_size + after % page_size, -1)
    tl.store(slots_ptr + rows, slot, mask=mask)
    tl.store(ids_ptr + rows, tl.load(next_ids_ptr + rows, mask=goes_on, other=0), mask=goes_on)
    tl.store(positions_ptr + rows, after, mask=goes_on)
    seqlen = tl.load(seqlens_ptr + rows, mask=mask, other=0)
    tl.store(seqlens_ptr + rows, seqlen + 1, mask=goes_on)
    offset = tl.load(offsets_ptr + rows, mask=mask, other=0)
    tl.store(offsets_ptr + rows, offset + 1, mask=goes_on)
