"""Tiny random models of every family, and packed steps over a paged cache to run them with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import gguf
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamatelemetry.models.patching import forward_tokens, rope_tables
from llamatelemetry.models.step_input import DecoderState, StepInput
from llamatelemetry.ops import QuantFormat, repack
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear

VOCAB = 97
HEAD_DIM = 64
NUM_KV = 3
LAYERS = 2
WINDOW = 5

# Odd head counts, grouped queries, heads wider together than the hidden size.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 288,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3 * NUM_KV,
    "num_key_value_heads": NUM_KV,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
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
    "apertus": ("Apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "cwm": ("Cwm", _SLIDING),
    "glm": ("Glm", {"attention_bias": True}),
    "glm4": ("Glm4", {}),
    "helium": ("Helium", {"hidden_size": 9 * HEAD_DIM}),
    "hunyuan": ("HunYuanDenseV1", {}),
    "ministral": ("Ministral", _SLIDING),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3_partial": ("Phi3", {"partial_rotary_factor": 0.75}),
    "seed_oss": ("SeedOss", {"attention_bias": True, "attention_out_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}
# Tiny models of classes that the table of families has no row for.
_OTHERS = {
    "olmo2": ("Olmo2", {}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}


def tiny_model(
    family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """A random model of a family whose every parameter matters."""
    name, options = (FAMILIES | _OTHERS)[family]
    config = getattr(transformers, f"{name}Config")(**(_COMMON | options))
    with torch.inference_mode(False), torch.no_grad():
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
        return model.to(device=device, dtype=dtype)


def quantise_(model: transformers.PreTrainedModel, formats: Sequence[str] = ("Q4_1",)) -> None:
    """Packs a model's weights in place, linears in the formats in turn; the embedding is tied."""
    device, dtype = model.device, model.model.norm.weight.dtype

    def pack(weight: Tensor, kind: QuantFormat) -> Tensor:
        rows = gguf.quants.quantize(
            weight.float().cpu().numpy(), gguf.GGMLQuantizationType[kind.name]
        )
        return repack(torch.from_numpy(rows), kind).to(device)

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for (name, linear), format in zip(linears, itertools.cycle(formats), strict=False):
        kind = QuantFormat[format]
        packed = pack(linear.weight, kind)
        model.set_submodule(name, QuantLinear(packed, kind, linear.out_features, linear.bias))
    packed = pack(model.model.embed_tokens.weight, QuantFormat.Q8_0)
    model.model.embed_tokens = QuantEmbedding(packed, QuantFormat.Q8_0, VOCAB, dtype)
    model.lm_head = QuantLinear(packed, QuantFormat.Q8_0, VOCAB)


class PackedRun:
    """Sequences that grow step by step in a shuffled paged cache whose empty slots hold NaN."""

    def __init__(self, model: transformers.PreTrainedModel, batch: int, page_size: int = 4) -> None:
        self.model, self.page_size = model, page_size
        like = model.model.norm.weight
        blocks = 32 // page_size
        shape = (batch * blocks, page_size, NUM_KV, HEAD_DIM)
        caches = [
            (like.new_full(shape, torch.nan), like.new_full(shape, torch.nan))
            for _ in range(LAYERS)
        ]
        self.state = DecoderState(caches, rope_tables(model, 32))
        self.table = torch.randperm(batch * blocks).view(batch, blocks).int()
        self.lengths = [0] * batch

    def input(self, counts: Sequence[int]) -> StepInput:
        """The input of a step that gives sequence b counts[b] more tokens."""
        device = self.model.device
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        positions = torch.cat(
            [torch.arange(n, n + count) for n, count in zip(self.lengths, counts, strict=True)]
        )
        blocks = self.table[rows, positions // self.page_size].long()
        is_whole = not any(self.lengths)
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return StepInput(
            positions=positions.to(device),
            slot_mapping=(blocks * self.page_size + positions % self.page_size).to(device),
            block_table=self.table.to(device),
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
            max_seqlen_q=max(counts),
            is_whole=is_whole,
        )

    def step(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [batch, vocab] after each sequence's new tokens."""
        ids = torch.cat(list(tokens)).to(self.model.device)
        return forward_tokens(self.model, ids, self.input([len(t) for t in tokens]), self.state)


class OpCounter(TorchDispatchMode):
    """Counts calls by op name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
