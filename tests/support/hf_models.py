"""Tiny random transformers models of many kinds of attention, and inputs for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import sdpa_mask

BATCH, SEQLEN, VOCAB = 2, 12, 128
PADDING = 3  # fewer than a window, or padding would see no key and have no right value
WINDOW = 4

TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TEXT = {
    "vocab_size": VOCAB,
    **TINY_SIZES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ENCODER = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_WINDOW = {"sliding_window": WINDOW}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


class Case(NamedTuple):
    """model class, config class, its options, and how it is fed: causal, encoder, seq2seq, ..."""

    model: str
    config: str
    options: dict
    kind: str = "causal"


def _lm(name: str, **options) -> Case:
    return Case(f"{name.removesuffix('Text')}ForCausalLM", f"{name}Config", _TEXT | options)


CASES = {
    "llama": _lm("Llama"),
    "llama_head_dim_20": _lm("Llama", head_dim=20),
    "llama_head_dim_264": _lm("Llama", head_dim=264),
    "mistral": _lm("Mistral", **_WINDOW),
    "qwen2_mixed": _lm("Qwen2", use_sliding_window=True, max_window_layers=1, **_WINDOW),
    "gemma2": _lm("Gemma2", head_dim=16, **_WINDOW),
    "gemma3": _lm("Gemma3Text", head_dim=16, **_WINDOW),
    "gpt_oss": _lm("GptOss", head_dim=16, num_local_experts=4, **_WINDOW),
    "doge": _lm("Doge"),
    "minicpm3": _lm("MiniCPM3", **_MLA),
    "deepseek_v3": _lm(
        "DeepseekV3", moe_intermediate_size=32, first_k_dense_replace=2, **_MLA, **_MOE
    ),
    "cohere2": _lm("Cohere2", **_WINDOW),
    "llama4_chunked": _lm(
        "Llama4Text",
        attention_chunk_size=8,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        no_rope_layers=[1, 0],
    ),
    "phi3": _lm("Phi3"),
    "starcoder2": _lm("Starcoder2", **_WINDOW),
    "stablelm": _lm("StableLm"),
    "olmo3": _lm("Olmo3", **_WINDOW),
    "smollm3": _lm("SmolLM3"),
    "gpt_neox": _lm("GPTNeoX"),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": None},
    ),
    "opt": _lm("OPT", ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
    "bert": Case("BertModel", "BertConfig", _ENCODER, "encoder"),
    "roberta": Case("RobertaModel", "RobertaConfig", _ENCODER, "encoder"),
    "modernbert": Case(
        "ModernBertModel",
        "ModernBertConfig",
        _ENCODER | {"num_hidden_layers": 3, "local_attention": 2 * WINDOW, "eos_token_id": 2},
        "encoder",
    ),
    "vit": Case("ViTModel", "ViTConfig", _VISION, "vision"),
    "siglip": Case("SiglipVisionModel", "SiglipVisionConfig", _VISION, "vision"),
    "bart": Case("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, "seq2seq"),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
        "audio",
    ),
    "bigbird_pegasus": Case("BigBirdPegasusModel", "BigBirdPegasusConfig", _SEQ2SEQ, "seq2seq"),
    "t5": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
    ),
}
# The oldest transformers that is supported lacks some, and T5 on AttentionInterface.
if not hasattr(transformers.models.t5.modeling_t5, "eager_attention_forward"):
    del CASES["t5"]
CASES = {name: case for name, case in CASES.items() if hasattr(transformers, case.model)}
CAUSAL = [name for name, case in CASES.items() if case.kind == "causal"]


def exact_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    softcap=None,
    s_aux=None,
    position_bias=None,
    is_causal=None,
    **kwargs,
):
    """Attention that never leaves its dtype, where eager ones take the softmax in float32."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -1e300)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("exact", exact_attention)
transformers.AttentionMaskInterface.register("exact", sdpa_mask)


def build_exact(
    name: str,
    like: transformers.PreTrainedModel | None = None,
    device: torch.device | str = "cpu",
) -> transformers.PreTrainedModel:
    """The model in float64, of the weights of another one or of its own."""
    model = build(name, "exact", torch.float64, device)
    if like is not None:
        model.load_state_dict({key: x.double() for key, x in like.state_dict().items()})
    return model


def build(
    name: str,
    attention: str = "eager",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> transformers.PreTrainedModel:
    """The same random weights for every attention and dtype."""
    case = CASES[name]
    config = getattr(transformers, case.config)(**case.options)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        kind = getattr(transformers, case.model)
        model = kind._from_config(config, attn_implementation=attention).eval()
        if dtype == torch.float64 and case.options.keys() & {"num_local_experts", *_MOE}:
            model.set_experts_implementation("eager")  # the others have no float64
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.15, generator=generator)
        return model.to(device, dtype)


def padded(side: str, length: int = SEQLEN) -> Tensor:
    """An attention mask whose first row has PADDING slots of padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if side == "left":
        mask[0, :PADDING] = 0
    if side == "right":
        mask[0, -PADDING:] = 0
    return mask


def inputs_of(name: str, side: str = "none", device: torch.device | str = "cpu") -> dict:
    """Inputs of one forward; side is left, right or none."""
    kind = CASES[name].kind
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, SEQLEN), generator=generator)
    text = {"input_ids": ids, "attention_mask": padded(side)}
    decoder = {"decoder_input_ids": ids.flip(1)[:, :7]}
    inputs = {
        "causal": lambda: text,
        "encoder": lambda: text,
        "seq2seq": lambda: text | decoder,
        "vision": lambda: {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)},
        "audio": lambda: (
            {"input_features": torch.randn(BATCH, 8, 40, generator=generator)} | decoder
        ),
    }[kind]()
    return {key: value.to(device) for key, value in inputs.items()}


def result(model: transformers.PreTrainedModel, inputs: dict) -> Tensor:
    """Logits or hidden states, [tokens, width], of what is not padding."""
    model_dtype = next(model.parameters()).dtype
    if (features := inputs.get("input_features", inputs.get("pixel_values"))) is not None:
        key = "input_features" if "input_features" in inputs else "pixel_values"
        inputs = inputs | {key: features.to(model_dtype)}
    out = model(**inputs)[0]
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape[1] != out.shape[1]:
        return out.flatten(0, 1)
    return out[mask.bool()]
