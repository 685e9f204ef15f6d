"""Tiny random models of every family, and packed steps over a paged cache to run them with."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import gguf
import hf_models  # noqa: F401  (registers "exact" attention)
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamatelemetry.inference.kv_pages import KvPages
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
_LEFT_OUT = ("head_dim", "num_key_value_heads")  # where None
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Heads together as wide as the hidden size; and as many for keys as for queries.
_SQUARE = {"hidden_size": 3 * NUM_KV * HEAD_DIM // 2, "head_dim": None}
_HEADS = _SQUARE | {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": None}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.5,
}
# Whose every linear can hold packed weights, and the embedding too.
_PACKABLE = {
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
    "granite": ("Granite", _MULTIPLIERS),
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
FAMILIES = {
    **_PACKABLE,
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", _SLIDING | {"query_pre_attn_scalar": 50, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3Text",
        _SLIDING | {"query_pre_attn_scalar": 50, "final_logit_softcapping": 5.0},
    ),
    "vaultgemma": ("VaultGemma", _SLIDING | {"attn_logit_softcapping": 2.0}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": ("Olmo3", _SLIDING),
    "exaone4": ("Exaone4", _SLIDING),
    "exaone4_full": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS},
    ),
    "ernie": ("Ernie4_5", {"use_bias": True}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2", _SLIDING | {"logit_scale": 0.3}),
    "olmo": ("Olmo", _SQUARE),
    "stablelm": ("StableLm", _SQUARE | {"use_qkv_bias": True}),
    "stablelm_parallel": ("StableLm", _SQUARE | {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "phi": ("Phi", _SQUARE),
    "nemotron": ("Nemotron", {"attention_bias": True}),
    "gpt2": ("GPT2", _HEADS | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoX", _HEADS),
    "gpt_neox_serial": ("GPTNeoX", _HEADS | {"use_parallel_residual": False}),
    "biogpt": ("BioGpt", _HEADS | {"activation_dropout": 0.0}),
    "hyperclovax": ("HyperCLOVAX", _MULTIPLIERS | {"use_post_norm": True, "head_dim": 64}),
    "hyperclovax_plain": ("HyperCLOVAX", {"use_post_norm": False}),
    "opt": ("OPT", _HEADS | {"word_embed_proj_dim": 192, "ffn_dim": 160}),
    "mixtral": ("Mixtral", _EXPERTS | {"sliding_window": WINDOW}),
    "qwen2_moe": (
        "Qwen2Moe",
        _EXPERTS | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS),
    "olmoe": ("Olmoe", _SQUARE | _EXPERTS),
    "granitemoe": (
        "GraniteMoe",
        _SQUARE | _EXPERTS | _MULTIPLIERS,
    ),
    "gpt_oss": ("GptOss", _SLIDING | _EXPERTS),
}

# The oldest transformers that is supported has its attention outside of AttentionInterface.
if not hasattr(transformers.models.nemotron.modeling_nemotron, "eager_attention_forward"):
    del FAMILIES["nemotron"]
FAMILIES = {key: row for key, row in FAMILIES.items() if hasattr(transformers, f"{row[0]}Config")}
QUANTISED = [*_PACKABLE, "olmo2", "exaone4", "ernie", "cohere2"]
# Half precision where the layer rounds in another place than Llama's does.
_IN_HALF = [*QUANTISED, "gemma2", "phi", "gpt_neox", "gpt_oss"]
IN_DTYPES = [
    pytest.param(family, dtype, id=f"{str(dtype)[6:]}-{family}")
    for family in FAMILIES
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if dtype == torch.float32 or family in _IN_HALF
]


def tiny_model(
    family: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """A random model of a family whose every parameter matters."""
    name, options = FAMILIES[family]
    values = {k: v for k, v in (_COMMON | options).items() if k not in _LEFT_OUT or v is not None}
    config = getattr(transformers, f"{name}Config")(**values)
    if getattr(config, "attn_logit_softcapping", None):
        # torch's attention leaves it out, and eager's masks are infinite in float64
        config._attn_implementation = "exact" if dtype == torch.float64 else "eager"
    with torch.inference_mode(False), torch.no_grad():
        model = getattr(transformers, _causal(name))(config).eval()
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others have no float64
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
        return model.to(device=device, dtype=dtype)


def _causal(name: str) -> str:
    return {"GPT2": "GPT2LMHeadModel"}.get(name, name.removesuffix("Text") + "ForCausalLM")


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
        blocks = 32 // page_size
        pages = KvPages.for_model(model, batch * blocks, page_size)
        for cache in itertools.chain(*pages.layers):
            cache.fill_(torch.nan)
        self.state = DecoderState(pages.layers, rope_tables(model, 32))
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
