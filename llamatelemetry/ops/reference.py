"""The semantics of every op in plain PyTorch: the tests' oracle, and what to read first.

Each function computes in the dtype it is given; tests pass float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops.formats import GGUF_BLOCKS, TILE_ROWS
from llamatelemetry.ops.reference_attention import (  # noqa: F401
    flash_attn,
    flash_attn_varlen,
    paged_attention,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def fused_add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual += x
    x.copy_(rms_norm(residual, weight, eps))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rotary_embedding_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    rows = torch.arange(q.shape[0], device=q.device) if positions is None else positions
    cos, sin = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
    for x in (q, k):
        turned = x[..., : cos.shape[-1]]
        if interleaved:
            half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            half = torch.cat([-second, first], -1)
        turned.copy_(turned * cos + half * sin)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / 2 * (1 + torch.erf(gate / 2**0.5)) * up


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(inner)) * up


def softmax(x: Tensor, temperature: float) -> Tensor:
    y = x / temperature
    power = torch.exp(y - y.amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True)


def dequantize(data: Tensor, format: int) -> Tensor:
    """GGUF blocks to float32."""
    num_bytes = GGUF_BLOCKS[format][1]
    blocks = data.reshape(-1, num_bytes)
    half = blocks.contiguous().view(torch.float16).float()

    def planes(field: Tensor, group: int, bits: int) -> Tensor:
        """The values of `bits` bits of a field: all lowest of `group` bytes, then all next..."""
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        grouped = field.reshape(field.shape[0], -1, 1, group) >> shifts.view(-1, 1)
        return (grouped & (2**bits - 1)).flatten(1).int()

    if format in (2, 3):
        first = {2: 2, 3: 4}[format]
        codes = planes(blocks[:, first:], 16, 4)
    elif format in (6, 7):
        first = {6: 2, 7: 4}[format]
        fifth = planes(blocks[:, first : first + 4], 1, 1)
        codes = planes(blocks[:, first + 4 :], 16, 4) + 16 * fifth
    elif format == 8:
        codes = blocks[:, 2:].view(torch.int8).int()
    elif format == 12:
        codes = planes(blocks[:, 16:], 32, 4)
    elif format == 13:
        codes = planes(blocks[:, 48:], 32, 4) + 16 * planes(blocks[:, 16:48], 32, 1)
    else:
        codes = planes(blocks[:, :128], 64, 4) + 16 * planes(blocks[:, 128:192], 32, 2)
    weights = codes - {2: 8, 6: 16, 14: 32}.get(format, 0)

    if format in (12, 13):
        s = blocks[:, 4:16].int()
        low, high = s[:, :8], s[:, 8:]
        scale = torch.cat([low[:, :4] & 63, (high & 15) | (low[:, :4] >> 6 << 4)], 1)
        minimum = torch.cat([low[:, 4:] & 63, (high >> 4) | (low[:, 4:] >> 6 << 4)], 1)
        grouped = weights.view(-1, 8, 32) * (half[:, :1] * scale).unsqueeze(-1)
        out = grouped - (half[:, 1:2] * minimum).unsqueeze(-1)
    elif format == 14:
        scale = half[:, -1:] * blocks[:, 192:208].view(torch.int8)
        out = weights.view(-1, 16, 16) * scale.unsqueeze(-1)
    else:
        out = weights * half[:, :1]
        out = out + half[:, 1:2] if format in (3, 7) else out
    return out.view(*data.shape[:-1], data.shape[-1] // num_bytes * weights.shape[1])


def append_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    page_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < k_cache.shape[0] * page_size:
            k_cache[slot // page_size, slot % page_size] = k[token]
            v_cache[slot // page_size, slot % page_size] = v[token]


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    num_blocks = k_cache.shape[0]
    for src, dst in block_pairs.tolist():
        if 0 <= src < num_blocks and 0 <= dst < num_blocks:
            k_cache[dst] = k_cache[src]
            v_cache[dst] = v_cache[src]


def slot_mapping(
    positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page_size: int
) -> Tensor:
    slots = torch.full_like(positions, -1)
    starts = cu_seqlens_q.tolist()
    for table, begin, end in zip(block_table.tolist(), starts[:-1], starts[1:], strict=True):
        for token in range(begin, end):
            position = int(positions[token])
            if 0 <= position < len(table) * page_size and table[position // page_size] >= 0:
                block = table[position // page_size]
                slots[token] = block * page_size + position % page_size
    return slots


def advance_step_(
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_seqlens: Tensor,
    offsets: Tensor,
    next_ids: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
) -> None:
    input_ids.copy_(torch.where(active, next_ids, input_ids))
    for counter in (positions, cache_seqlens, offsets):
        counter += active.to(counter.dtype)
    starts = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
    of_positions = slot_mapping(positions, block_table, starts, page_size)
    slots.copy_(torch.where(active, of_positions, -1))


# GGUF fields in packed order: (offset, bytes) in a block, see csrc/format/layout.h.
_PACKED_FIELDS = {
    2: [(2, 16), (0, 2)],
    3: [(4, 16), (0, 2), (2, 2)],
    6: [(6, 16), (2, 4), (0, 2)],
    7: [(8, 16), (4, 4), (0, 2), (2, 2)],
    8: [(2, 32), (0, 2)],
    12: [(16, 128), (4, 12), (0, 2), (2, 2)],
    13: [(48, 128), (16, 32), (4, 12), (0, 2), (2, 2)],
    14: [(0, 128), (128, 64), (192, 16), (208, 2)],
}


def repack(data: Tensor, format: int) -> Tensor:
    """GGUF rows to tiles of 16 rows: every field of a block transposed by words."""
    n, row_bytes = data.shape
    num_bytes = GGUF_BLOCKS[format][1]
    padded = torch.nn.functional.pad(data, (0, 0, 0, -n % TILE_ROWS))
    shape = (len(padded) // TILE_ROWS, TILE_ROWS, row_bytes // num_bytes, num_bytes)
    blocks = padded.view(shape).transpose(1, 2)
    fields = []
    for offset, size in _PACKED_FIELDS[format]:
        field = blocks[..., offset : offset + size]
        if size == 4:  # fifth bits: bit 4g + i to bit g of byte i
            bits = field.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1
            groups = bits.reshape(*field.shape[:-1], 8, 4).transpose(-1, -2)
            field = (groups << torch.arange(8, device=data.device)).sum(-1).to(torch.uint8)
        unit = min(size, 4)
        words = field.reshape(*field.shape[:-1], size // unit, unit)
        fields.append(words.transpose(-2, -3).flatten(-3))
    return torch.cat(fields, -1).flatten(1)


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. 2011: four 32-bit words of counter, two of key."""
    word = 2**32 - 1
    for i in range(10):
        key0, key1 = (key[0] + i * 0x9E3779B9) & word, (key[1] + i * 0xBB67AE85) & word
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key0, b & word, a >> 32 ^ counter[3] ^ key1, a & word]
    return counter


def sampling_probabilities(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """What sample draws one row from; the row holds a finite largest logit, temperature > 0."""
    scores = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf) / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        order = scores.sort(stable=True).indices.flip(0)  # higher ids first among equals
        probs = scores[order].softmax(0)
        removed = probs.cumsum(0) - probs >= max(top_p, 0) * (1 - 2**-23)  # its float32 rounding
        removed[0] = False
        scores = scores.index_fill(0, order[removed], -torch.inf)
    probs = scores.softmax(0)
    probs = probs.masked_fill(probs < min(min_p, 1) * probs.max(), 0)
    return probs / probs.sum()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    tokens = []
    for b, row in enumerate(logits):
        numbers = row.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if not temperature[b] > 0 or not torch.isfinite(numbers.max() / temperature[b]):
            at_largest = (row == numbers.max()).nonzero()
            tokens.append(int(at_largest[0]) if len(at_largest) else 0)
            continue
        words = [int(x[b]) >> shift & 2**32 - 1 for x in (offset, seed) for shift in (0, 32)]
        random = philox4x32([*words[:2], 0, 0], words[2:])
        uniform = (random[1] * 2**32 + random[0]) / 2**64
        probs = sampling_probabilities(
            row, float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b])
        )
        tokens.append(int((probs.cumsum(0) > uniform).nonzero()[0]))
    return torch.tensor(tokens, device=logits.device)


def rounded_activations(x: Tensor) -> Tensor:
    """x as the default mode of quant_linear sees it: int8 times a float32 scale per 32 values."""
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / torch.tensor(127.0, device=x.device)
    usable = scale >= torch.finfo(torch.float32).tiny
    q = torch.where(usable, (blocks * (1 / scale)).round(), 0.0)
    poison = (blocks * 0).sum(-1, keepdim=True)  # NaN where a block holds NaN or infinity
    return (q.to(x.dtype) * (scale + poison).to(x.dtype)).flatten(-2)


def quant_linear(x: Tensor, data: Tensor, format: int, bias: Tensor | None, exact: bool) -> Tensor:
    """data: the GGUF rows that repack packed."""
    out = (x if exact else rounded_activations(x)) @ dequantize(data, format).to(x.dtype).T
    return out if bias is None else out + bias


def quant_embedding(ids: Tensor, data: Tensor, format: int) -> Tensor:
    inside = (ids >= 0) & (ids < len(data))
    rows = dequantize(data, format)[torch.where(inside, ids, 0)]
    return torch.where(inside.unsqueeze(-1), rows, 0.0)
