"""Tiny random models of every family, and packed steps over a paged cache to run them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from llamatelemetry.models.attention import StepState
from llamatelemetry.models.patching import forward_tokens, rope_tables

VOCAB = 97
HEAD_DIM = 16
NUM_KV = 3
LAYERS = 2
WINDOW = 5

# Odd head counts, grouped queries, heads wider together than the hidden size.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3 * NUM_KV,
    "num_key_value_heads": NUM_KV,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
        },
    ),
}


def tiny_model(
    family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """A random model of a family whose every parameter matters."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(_COMMON | options))
    with torch.inference_mode(False), torch.no_grad():
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=0.15)
        return model.to(device=device, dtype=dtype)


class PackedRun:
    """Sequences that grow step by step in a shuffled paged cache whose empty slots hold NaN."""

    def __init__(self, model: transformers.PreTrainedModel, batch: int, page_size: int = 4) -> None:
        self.model, self.page_size = model, page_size
        like = model.model.norm.weight
        blocks = 32 // page_size
        shape = (batch * blocks, page_size, NUM_KV, HEAD_DIM)
        self.caches = [
            (like.new_full(shape, torch.nan), like.new_full(shape, torch.nan))
            for _ in range(LAYERS)
        ]
        self.table = torch.randperm(batch * blocks).view(batch, blocks).int()
        self.lengths = [0] * batch
        self.rope = rope_tables(model, 32)

    def state(self, counts: Sequence[int]) -> StepState:
        """The state of a step that gives sequence b counts[b] more tokens."""
        device = self.rope[0].device
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        positions = torch.cat(
            [torch.arange(n, n + count) for n, count in zip(self.lengths, counts, strict=True)]
        )
        blocks = self.table[rows, positions // self.page_size].long()
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return StepState(
            positions=positions.to(device),
            slot_mapping=(blocks * self.page_size + positions % self.page_size).to(device),
            block_table=self.table.to(device),
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
            max_seqlen_q=max(counts),
            caches=self.caches,
            cos=self.rope[0],
            sin=self.rope[1],
        )

    def step(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [batch, vocab] after each sequence's new tokens."""
        state = self.state([len(t) for t in tokens])
        return forward_tokens(self.model, torch.cat(list(tokens)).to(state.cos.device), state)
