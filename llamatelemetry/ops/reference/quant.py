"""Quantised weights as whole tensors in plain PyTorch, by code family and scale rule."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry._native.facts import FORMATS, FormatFacts
from llamatelemetry.ops.formats import TILE_ROWS, format_name

# What a nibble names: IQ4's values, and twice those of e2m1 (sign, two bits of exponent, one of
# mantissa).
_TABLES = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
# bitsandbytes': halves of NF4 below and from 0 on, as its functional.py lists them; FP4's twelfths
# without a sign.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def dequantize(
    data: Tensor, format: int | str, scales: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    """Blocks of a GGUF file to float32; of grouped formats with scales and zeros [n, groups]."""
    facts = FORMATS[format_name(format)]
    blocks = data.reshape(-1, facts.block_bytes)
    weights = _codes(blocks, facts) - facts.zero_point
    if scales is not None:
        grouped = weights.view(*scales.shape, -1).float()
        if zeros is not None:
            grouped = grouped - zeros.float().unsqueeze(-1)
        return (grouped * scales.float().unsqueeze(-1)).flatten(1)
    scale, minimum = _scales(blocks, facts)
    out = weights.view(len(blocks), scale.shape[1], -1) * scale.unsqueeze(-1)
    if minimum is not None:
        out = out + minimum.unsqueeze(-1)
    return out.view(*data.shape[:-1], data.shape[-1] // facts.block_bytes * facts.block_size)


def _field(blocks: Tensor, facts: FormatFacts, name: str) -> Tensor:
    offset, size = facts.fields[name]
    return blocks[..., offset : offset + size]


def _planes(field: Tensor, group: int, bits: int) -> Tensor:
    """The values of `bits` bits of a field: all lowest of `group` bytes, then all next..."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device)
    grouped = field.reshape(field.shape[0], -1, 1, group) >> shifts.view(-1, 1)
    return (grouped & (2**bits - 1)).flatten(1).int()


def _codes(blocks: Tensor, facts: FormatFacts) -> Tensor:
    """[blocks, block_size], in the order of the weights."""
    quants = _field(blocks, facts, "quants")
    if facts.codes == "s8":
        return quants.view(torch.int8).int()
    if facts.codes == "e4m3":
        return quants.view(torch.float8_e4m3fn).float()
    if facts.codes == "ternary":
        return _ternary_codes(quants)
    if facts.codes in ("u2", "u3"):
        codes = _planes(quants, 32, 2)
        if facts.codes == "u3":
            codes = codes + 4 * _planes(_field(blocks, facts, "high_bits"), 32, 1)
        return codes
    if facts.codes in ("nf4", "fp4"):
        return _float_table(facts.codes, blocks.device)[_planes(quants, 16, 4)]
    if facts.codes in _TABLES:  # blocks of 32 hold 16 bytes: the first 16 weights are low nibbles
        table = torch.tensor(_TABLES[facts.codes], dtype=torch.int32, device=blocks.device)
        return table[_planes(quants, 16, 4)]
    small = facts.block_size == 32
    if facts.codes == "u6":
        high_bits = _field(blocks, facts, "high_bits")
        return _planes(quants, 64, 4) + 16 * _planes(high_bits, 32, 2)
    codes = _planes(quants, 16 if small else 32, 4)
    if facts.codes == "u5":
        codes = codes + 16 * _planes(_field(blocks, facts, "high_bits"), 1 if small else 32, 1)
    return codes


def _float_table(codes: str, device: torch.device) -> Tensor:
    if codes == "nf4":
        return torch.tensor(_NF4, device=device)
    sizes = torch.tensor(_TWELFTHS) / 12
    return torch.cat([sizes, 0 - sizes]).to(device)


def _ternary_codes(quants: Tensor) -> Tensor:
    """Bytes as fractions of 256: their first five digits of base 3, four of the last four bytes."""
    powers = 3 ** torch.arange(5, device=quants.device)
    digits = (quants.int().unsqueeze(1) * powers.view(-1, 1) % 256) * 3 // 256
    parts = digits[..., :32], digits[..., 32:48], digits[:, :4, 48:]
    return torch.cat([part.flatten(1) for part in parts], 1).int()


def _scales(blocks: Tensor, facts: FormatFacts) -> tuple[Tensor, Tensor | None]:
    """[blocks, scales of a block]: the factor of the codes, and what is added."""
    if facts.scale_rule == "exponent":  # a byte e stands for 2^(e - 128): the codes are doubled
        exponent = _field(blocks, facts, "scale").double() - 128
        return torch.exp2(exponent).float(), None
    halves = {
        name: _field(blocks, facts, name).contiguous().view(torch.float16).float()
        for name in ("scale", "min")
        if name in facts.fields
    }
    d, minimum = halves["scale"], halves.get("min")
    if facts.scale_rule == "block":
        return d, minimum
    s = _field(blocks, facts, "sub_scales").int()
    if facts.scale_rule == "sub_block16":
        return d * _field(blocks, facts, "sub_scales").view(torch.int8), None
    if facts.scale_rule == "sub_block16_six":
        low = torch.cat([s[:, :8] & 15, s[:, :8] >> 4], 1)
        return d * ((low | _planes(s[:, 8:].to(torch.uint8), 4, 2) << 4) - 32), None
    if facts.scale_rule == "sub_block32_six":
        low = torch.stack([s & 15, s >> 4], -1).flatten(1)
        bits = _field(blocks, facts, "sub_scales_high").unsqueeze(-1)
        two = bits >> torch.arange(0, 8, 2, dtype=torch.uint8, device=bits.device) & 3
        return d * ((low | two.flatten(1).int() << 4) - 32), None
    assert minimum is not None
    if facts.scale_rule == "sub_block16_four":
        return d * (s & 15), -(minimum * (s >> 4))
    low, high = s[:, :8], s[:, 8:]
    scale = torch.cat([low[:, :4] & 63, (high & 15) | (low[:, :4] >> 6 << 4)], 1)
    sub_min = torch.cat([low[:, 4:] & 63, (high >> 4) | (low[:, 4:] >> 6 << 4)], 1)
    return d * scale, -(minimum * sub_min)


def repack(data: Tensor, format: int | str) -> Tensor:
    """Rows to tiles of 16 rows: every field of a block transposed by words."""
    facts = FORMATS[format_name(format)]
    n, row_bytes = data.shape
    num_bytes = facts.block_bytes
    padded = torch.nn.functional.pad(data, (0, 0, 0, -n % TILE_ROWS))
    shape = (len(padded) // TILE_ROWS, TILE_ROWS, row_bytes // num_bytes, num_bytes)
    blocks = padded.view(shape).transpose(1, 2)
    fields = []
    for name, (_, size) in facts.fields.items():
        field = _field(blocks, facts, name)
        if name == "high_bits" and size == 4:  # fifth bits: bit 4g + i to bit g of byte i
            bits = field.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1
            groups = bits.reshape(*field.shape[:-1], 8, 4).transpose(-1, -2)
            field = (groups << torch.arange(8, device=data.device)).sum(-1).to(torch.uint8)
        unit = min(size, 4)
        words = field.reshape(*field.shape[:-1], size // unit, unit)
        fields.append(words.transpose(-2, -3).flatten(-3))
    return torch.cat(fields, -1).flatten(1)


def quant_embedding(ids: Tensor, data: Tensor, format: int | str) -> Tensor:
    inside = (ids >= 0) & (ids < len(data))
    rows = dequantize(data, format)[torch.where(inside, ids, 0)]
    return torch.where(inside.unsqueeze(-1), rows, 0.0)
