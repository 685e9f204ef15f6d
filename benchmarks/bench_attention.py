"""paged_attention against scaled_dot_product_attention on contiguous keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from flashinfer_decode import flashinfer_baseline
from harness import Case, assert_close, main
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llamatelemetry.ops import cascade_attention, merge_attn_states, paged_attention
from llamatelemetry.ops.reference.cache import quantised

PAGE_SIZE = 16


def ours(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, *_
):
    return paged_attention(q, keys, values, table, lengths, starts, max_seqlen_q=len(q))[0]


def sm80(q: Tensor, *inputs: Tensor) -> Tensor:
    """The code for older GPUs."""
    return paged_attention(q, *inputs[:5], max_seqlen_q=len(q), backend="sm80")[0]


def sdpa(q: Tensor, *inputs: Tensor) -> Tensor:
    """One sequence over the same keys, contiguous."""
    q, (k, v) = q.transpose(0, 1)[None], inputs[-2:]
    bias = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, enable_gqa=k.shape[1] < q.shape[1]
    )
    return out[0].transpose(0, 1)


def decode(q: Tensor, *inputs: Tensor, **named: object) -> Tensor:
    """One query a sequence over pages."""
    return paged_attention(q[:, 0], *inputs[:5], max_seqlen_q=1, **named)[0][:, None]


decode_cut = partial(decode, split_size=1024)  # bit for bit the same whatever the batch
sm75 = partial(decode, backend="decode_sm75")  # the code for compute capability 7.5


def decode_sdpa(q: Tensor, *inputs: Tensor) -> Tensor:
    """Over the same keys, contiguous."""
    k, v = inputs[-2:]
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    return out.transpose(1, 2)


def decode_terms(q: Tensor, *inputs: Tensor) -> Tensor:
    """With sinks and ALiBi."""
    sinks, slopes, *_ = inputs[5:]
    terms = {"sinks": sinks, "alibi_slopes": slopes}
    return paged_attention(q[:, 0], *inputs[:5], max_seqlen_q=1, **terms)[0][:, None]


def decode_terms_sdpa(q: Tensor, *inputs: Tensor) -> Tensor:
    """A sink is a key of zeros whose value is zeros; the mask holds what is added to scores."""
    bias, k, v = inputs[-3:]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=bias, enable_gqa=True
    )
    return out.transpose(1, 2)


def with_terms(case: Case) -> Case:
    """A case of decode with sinks and ALiBi."""
    q, *paged, k, v = case.inputs
    num_heads, num_keys = q.shape[2], k.shape[2]
    sinks = torch.randn(num_heads, device=q.device)
    slopes = torch.rand(num_heads, device=q.device) / 64
    bias = slopes[:, None] * torch.arange(1 - num_keys, 1, device=q.device)
    bias = torch.cat([sinks[:, None], bias], 1).to(q.dtype)[None, :, None]
    wider = (torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in (k, v))
    return replace(
        case,
        name=f"{case.name}, sinks and ALiBi",
        inputs=(q, *paged, sinks, slopes, bias.expand(len(q), -1, -1, -1), *wider),
        ours=decode_terms,
        baselines={"sdpa": decode_terms_sdpa},
    )


def in_8_bits(case: Case, stored: torch.dtype) -> Case:
    """A case of decode over a cache of 8 bits, beside the same numbers in q's dtype."""
    q, keys, values, *where, _, _ = case.inputs
    caches, scales = zip(*(quantised(x, stored) for x in (keys, values)), strict=True)
    wide = [(x.float() * s.unsqueeze(-1)).to(q.dtype) for x, s in zip(caches, scales, strict=True)]

    def over_8_bits(q: Tensor, *inputs: Tensor) -> Tensor:
        named = {"k_scales": inputs[5], "v_scales": inputs[6]}
        return paged_attention(q[:, 0], *inputs[:5], max_seqlen_q=1, **named)[0][:, None]

    return replace(
        case,
        name=f"{case.name}, cache of {str(stored)[6:]}",
        inputs=(q, *caches, *where, *scales, *wide),
        ours=over_8_bits,
        baselines={"16 bits": lambda q, *inputs: decode(q, *inputs[-2:], *inputs[2:5])},
        bytes_moved=sum(x.nbytes for x in (*caches, *scales)),
    )


def with_drafts(case: Case, num_queries: int) -> Case:
    """A case of decode with so many queries a sequence, beside the last of them alone."""
    last, *paged, _, _ = case.inputs
    q = torch.randn_like(last.expand(-1, num_queries, -1, -1).contiguous())
    q[:, -1:] = last
    starts = paged[-1] * num_queries

    def all_queries(q: Tensor, *inputs: Tensor) -> Tensor:
        out, _ = paged_attention(q.flatten(0, 1), *inputs[:5], max_seqlen_q=num_queries)
        return out.view(q.shape)

    return replace(
        case,
        name=case.name.replace(", 1 of", f", {num_queries} of"),
        inputs=(q, *paged[:-1], starts, last, paged[-1]),
        ours=all_queries,
        baselines={"1 query": lambda *inputs: decode(inputs[6], *inputs[1:5], inputs[7])},
        check=lambda ours, theirs: assert_close(ours[:, -1:], theirs),
    )


def of_lengths(case: Case, lengths: list[int]) -> Case:
    """A case of decode whose sequences have fewer keys than their pages hold."""
    q, keys, values, table, seqlens, starts, _, _ = case.inputs
    inputs = (q, keys, values, table, seqlens.new_tensor(lengths), starts)
    num_bytes = sum(lengths) * (keys[0, 0].nbytes + values[0, 0].nbytes)
    return replace(
        case,
        name=f"batch {len(lengths)}, 1 of {min(lengths)} to {max(lengths)} bfloat16",
        inputs=inputs,
        baselines=flashinfer_baseline(*inputs),
        bytes_moved=num_bytes,
    )


def decode_case(
    device: torch.device,
    batch: int,
    num_keys: int,
    page_size: int = PAGE_SIZE,
    heads: tuple[int, int] = (32, 8),
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """A decode step of a batch on a GPU, Llama-3-8B's heads unless said."""
    (heads_q, heads_kv), head_dim = heads, 128
    pages = num_keys // page_size
    shape = (batch * pages, page_size, heads_kv, head_dim)
    q = torch.randn(batch, 1, heads_q, head_dim, device=device, dtype=dtype)
    keys, values = (torch.randn(shape, device=device, dtype=q.dtype) for _ in range(2))
    order = torch.randperm(batch * pages, device=device)
    contiguous = (
        x[order].view(batch, num_keys, heads_kv, head_dim).transpose(1, 2).contiguous()
        for x in (keys, values)
    )
    inputs = (
        q,
        keys,
        values,
        order.int().view(batch, pages),
        torch.full((batch,), num_keys, dtype=torch.int32, device=device),
        torch.arange(batch + 1, dtype=torch.int32, device=device),
        *contiguous,
    )
    name = f"batch {batch}, 1 of {num_keys} {heads_q}/{heads_kv}x{head_dim} {str(dtype)[6:]}"
    return Case(
        name if page_size == PAGE_SIZE else f"{name}, pages of {page_size}",
        inputs=inputs,
        ours=decode,
        baselines={"sdpa": decode_sdpa, **flashinfer_baseline(*inputs)},
        bytes_moved=keys.nbytes + values.nbytes,
    )


def decode_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(1, 4096), (32, 1024)]
    if not quick:
        sizes = [(1, 1024), (1, 4096), (1, 32768), (4, 4096)]
        sizes += [(8, 4096), (32, 1024), (32, 4096), (32, 8192), (64, 8192), (128, 1024)]
        yield decode_case(device, 1, 1024, heads=(32, 4))
        yield decode_case(device, 32, 4096, page_size=8, heads=(32, 32))
        lengths = [128 << i % 9 for i in range(16)]
        yield of_lengths(decode_case(device, 16, 1 << 15), lengths)
    for batch, num_keys in sizes:
        case = decode_case(device, batch, num_keys)
        yield case
        if not quick and (batch, num_keys) in ((1, 4096), (32, 4096)):
            for page_size in (1, 64, 256):
                yield decode_case(device, batch, num_keys, page_size)
        if (batch, num_keys) == (32, 4096):
            yield replace(case, name=f"{case.name}, split_size 1024", ours=decode_cut)
            yield with_terms(case)
            yield with_drafts(case, 16)
        if (batch, num_keys) in ((1, 4096), (8, 4096), (32, 4096), (32, 8192)):
            for stored in (torch.float8_e4m3fn, torch.int8):
                yield in_8_bits(case, stored)
        if (batch, num_keys) in ((1, 4096), (32, 1024)):
            half = decode_case(device, batch, num_keys, dtype=torch.float16)
            yield replace(half, name=f"{half.name}, sm75", ours=sm75, baselines={"chosen": decode})


def cascade(device: torch.device, batch: int, num_shared: int, num_own: int) -> Case:
    """A decode step of sequences that share a prefix, beside the same without telling so."""
    heads_q, heads_kv, head_dim = (32, 8, 128) if device.type == "cuda" else (9, 3, 64)
    shared, own = num_shared // PAGE_SIZE, num_own // PAGE_SIZE
    shape = (shared + batch * own, PAGE_SIZE, heads_kv, head_dim)
    q = torch.randn(batch, heads_q, head_dim, device=device).bfloat16()
    keys, values = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    order = torch.randperm(shape[0], device=device, dtype=torch.int32)
    table = torch.cat([order[:shared].expand(batch, -1), order[shared:].view(batch, own)], 1)
    lengths = torch.full((batch,), num_shared + num_own, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return Case(
        f"cascade, {batch} sequences, {num_shared} keys shared, {num_own} own bfloat16",
        inputs=(q, keys, values, table.contiguous(), lengths, starts),
        ours=lambda *args: cascade_attention(*args, num_shared_blocks=shared, max_seqlen_q=1)[0],
        baselines={"paged_attention": lambda *args: paged_attention(*args, max_seqlen_q=1)[0]},
    )


def merge_states(device: torch.device, num_tokens: int) -> Case:
    shape = (num_tokens, 32, 128)
    outs = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
    lses = [torch.randn(shape[1::-1], device=device) for _ in range(2)]

    def theirs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        a, b = ((x - lse).exp().T[..., None] for x in (lse_a, lse_b))
        return (a * out_a + b * out_b).to(out_a.dtype), lse

    return Case(
        f"merge_attn_states {num_tokens}x32x128 bfloat16",
        inputs=(outs[0], lses[0], outs[1], lses[1]),
        ours=lambda *args: merge_attn_states(*args),
        baselines={"torch": theirs},
        bytes_moved=3 * (outs[0].nbytes + lses[0].nbytes),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if device.type == "cuda":
        yield from decode_cases(device, quick)
        for batch, num_shared in [(8, 2048), (32, 8192), (64, 8192)][: 1 if quick else 3]:
            yield cascade(device, batch, num_shared, num_own=256)
    for num_tokens in (32, 4096)[: 1 if quick else 2]:
        yield merge_states(device, num_tokens)
    heads_q, heads_kv, head_dim = (9, 3, 64) if device.type == "cpu" else (32, 8, 128)
    dtypes = [torch.bfloat16] if quick or device.type == "cuda" else [torch.float32, torch.bfloat16]
    sizes = [(1, 1024), (128, 128)] if quick else [(1, 128), (1, 1024), (1, 4096)]
    if not quick:
        sizes += [(128, 128), (1024, 1024)]
    if not quick and device.type == "cuda":
        sizes += [(8192, 8192), *((n, 16384) for n in (16, 128, 256, 512, 2048))]
    for dtype in dtypes:
        for num_queries, num_keys in sizes:
            num_pages = num_keys // PAGE_SIZE
            shape = (num_pages, PAGE_SIZE, heads_kv, head_dim)
            q = torch.randn(num_queries, heads_q, head_dim, device=device).to(dtype)
            keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            lengths = torch.tensor([num_keys], dtype=torch.int32, device=device)
            starts = torch.tensor([0, num_queries], dtype=torch.int32, device=device)
            is_decode = num_queries == 1
            pairs = num_queries * (2 * num_keys - num_queries + 1) // 2  # that see each other
            flat = (x.flatten(0, 1).transpose(0, 1)[None] for x in (keys, values))
            # Grouped heads would keep torch from its fused kernel, so it gets repeated ones.
            repeats = 1 if is_decode else heads_q // heads_kv
            case = Case(
                f"{num_queries} of {num_keys} {heads_q}/{heads_kv}x{head_dim} {str(dtype)[6:]}",
                inputs=(
                    q,
                    keys,
                    values,
                    torch.arange(num_pages, dtype=torch.int32, device=device)[None],
                    lengths,
                    starts,
                    *(x.repeat_interleave(repeats, 1) for x in flat),
                ),
                ours=ours,
                baselines={"sdpa": sdpa},
                bytes_moved=keys.nbytes + values.nbytes if is_decode else None,
                flops=None if is_decode else 4 * heads_q * head_dim * pairs,
                flops_dtype=torch.float32 if device.type == "cpu" else dtype,
            )
            yield case
            if num_queries == 2048:
                yield replace(case, name=f"{case.name}, sm80", ours=sm80, baselines={"sm90": ours})


if __name__ == "__main__":
    main("attention", cases)
