"""Row ops against torch's own: shapes of SmolLM2-135M on the CPU, of an 8B model on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamatelemetry import ops

EPS = 1e-6
TEMPERATURE = 0.7
# hidden size, intermediate size, query heads, key heads, head_dim, vocabulary
SIZES = {"cpu": (576, 1536, 9, 3, 64, 49152), "cuda": (4096, 14336, 32, 8, 128, 128256)}
# Of layer norms, from BERT's to OPT-175B's; GPT-2's four, and one that no power of two divides.
HIDDEN_SIZES = (768, 1000, 1024, 1280, 1600, 2048, 4096, 5120, 8192, 12288)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    ops.fused_add_rms_norm_(x, residual, weight, EPS)
    return x, residual


def add_then_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual.add_(x)
    return functional.rms_norm(residual, weight.shape, weight, EPS), residual


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    ops.rotary_embedding_(q, k, cos, sin)
    return q, k


class Inputs:
    """Random tensors of one device and dtype, and a case's name."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def name(self, op: str, *shape: int) -> str:
        return f"{op} {'x'.join(map(str, shape))} {str(self.dtype)[6:]}"


def norms(random: Inputs, num_tokens: int, hidden_size: int) -> Iterator[Case]:
    x, residual = random(num_tokens, hidden_size), random(num_tokens, hidden_size)
    weight = random(hidden_size)
    shape = (num_tokens, hidden_size)
    yield Case(
        random.name("rms_norm", *shape),
        inputs=(x, weight),
        ours=lambda x, w: ops.rms_norm(x, w, EPS),
        baselines={"torch": lambda x, w: functional.rms_norm(x, w.shape, w, EPS)},
        bytes_moved=2 * x.nbytes,
    )
    yield Case(
        random.name("fused_add_rms_norm_", *shape),
        inputs=(x, residual, weight),
        ours=fused_add_rms_norm,
        baselines={"torch": add_then_rms_norm},
        bytes_moved=4 * x.nbytes,
    )
    yield layer_norm(random, *shape)


def layer_norm(random: Inputs, num_tokens: int, hidden_size: int) -> Case:
    x, weight, bias = random(num_tokens, hidden_size), random(hidden_size), random(hidden_size)
    return Case(
        random.name("layer_norm", num_tokens, hidden_size),
        inputs=(x, weight, bias),
        ours=lambda x, w, b: ops.layer_norm(x, w, b, EPS),
        baselines={"torch": lambda x, w, b: functional.layer_norm(x, w.shape, w, b, EPS)},
        bytes_moved=2 * x.nbytes,
    )


def other_row_ops(random: Inputs, num_tokens: int) -> Iterator[Case]:
    _, width, heads_q, heads_kv, head_dim, _ = SIZES[random.device.type]
    x = random(num_tokens, 2 * width)
    for name, activation in {
        "silu_and_mul": functional.silu,
        "gelu_and_mul": functional.gelu,
        "gelu_tanh_and_mul": lambda gate: functional.gelu(gate, approximate="tanh"),
    }.items():
        yield Case(
            random.name(name, num_tokens, width),
            inputs=(x,),
            ours=getattr(ops, name),
            baselines={
                "torch": lambda x, f=activation, n=width: f(x[:, :n]) * x[:, n:],
            },
            bytes_moved=x.nbytes * 3 // 2,
        )
    for kind, torch_s in {
        "relu2": lambda x: functional.relu(x).square(),
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }.items():
        yield Case(
            random.name(f"activation {kind}", *x.shape),
            inputs=(x,),
            ours=lambda x, kind=kind: ops.activation(x, kind),
            baselines={"torch": torch_s},
            bytes_moved=2 * x.nbytes,
        )
    q, k = random(num_tokens, heads_q, head_dim), random(num_tokens, heads_kv, head_dim)
    angles = torch.rand(num_tokens, head_dim // 2, device=random.device).repeat(1, 2)
    yield Case(
        random.name("rotary_embedding_", num_tokens, heads_q + heads_kv, head_dim),
        inputs=(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype)),
        ours=rotary_embedding,
        baselines={"torch": apply_rotary_pos_emb},
        bytes_moved=2 * (q.nbytes + k.nbytes),
    )


def softmax(random: Inputs, num_rows: int) -> Iterator[Case]:
    x = random(num_rows, SIZES[random.device.type][-1])
    yield Case(
        random.name("softmax", *x.shape),
        inputs=(x,),
        ours=lambda x: ops.softmax(x, TEMPERATURE),
        baselines={"torch": lambda x: torch.softmax(x / TEMPERATURE, -1)},
        bytes_moved=2 * x.nbytes,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_cpu = device.type == "cpu"
    hidden_size = SIZES[device.type][0]
    dtypes = [torch.float32, torch.bfloat16] if on_cpu else [torch.bfloat16]
    for dtype in dtypes[:1] if quick else dtypes:
        random = Inputs(device, dtype)
        for num_tokens in [1] if quick else [1, 128] if on_cpu else [1, 32, 4096]:
            yield from norms(random, num_tokens, hidden_size)
        for num_tokens in [1] if quick else [1, 128 if on_cpu else 4096]:
            yield from other_row_ops(random, num_tokens)
    for num_rows in [1] if quick else [1, 8 if on_cpu else 64]:
        yield from softmax(Inputs(device, torch.float32), num_rows)
    if not on_cpu:
        random = Inputs(device, torch.bfloat16)
        yield from norms(random, 8192, 8192)
        if not quick:
            for hidden_size in HIDDEN_SIZES:
                yield layer_norm(random, 2048, hidden_size)


if __name__ == "__main__":
    main("norm", cases)
