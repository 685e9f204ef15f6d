"""The public names of llamatelemetry.inference: where they are, their signatures and defaults."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from api_names import assert_fields, assert_signature, rows

import llamatelemetry.inference as package

# module -> name -> (parameter, default) pairs in order; a parameter alone has no default.
FUNCTIONS = {
    "batch": {
        "BatchInferenceOptimizer": [("config", None), ("count_tokens", None)],
        "BatchInferenceOptimizer.batch_infer": ["prompts", "inference_fn", "**kwargs"],
        "ContinuousBatching": [
            ("max_batch_size", 8),
            ("engine", None),
            ("max_step_tokens", None),
            ("num_blocks", None),
            ("share_prefixes", True),
            ("num_host_blocks", 0),
            ("overlap", None),
            ("cache_dtype", None),
            ("split_size", 0),
            ("speculation", None),
            ("prefill_chunk", None),
        ],
        "ContinuousBatching.submit": [
            "prompt",
            ("params", None),
            ("max_tokens", 128),
            "**options",
        ],
        "ContinuousBatching.submit_group": [
            "prompt",
            "params",
            ("max_tokens", 128),
            ("min_tokens", 0),
            ("stop_sequences", ()),
            ("stop_token_ids", ()),
            ("ignore_eos", False),
            ("priority", 0),
            ("logits", None),
            ("time_limit_s", None),
            ("wait_limit_s", None),
            ("shown_tokens", ()),
            ("num_beams", 1),
            ("speculate", True),
            ("length_penalty", 1.0),
            ("early_stopping", False),
        ],
        "ContinuousBatching.step": [],
        "ContinuousBatching.run": [],
        "batch_inference_optimized": ["prompts", "model", ("max_batch_size", 8), "**kwargs"],
    },
    "flash_attn": {
        "check_flash_attention_available": [],
        "enable_flash_attention": ["model", ("config", None)],
        "disable_flash_attention": ["model"],
        "flash_attention_forward": [
            "query",
            "key",
            "value",
            ("causal", True),
            ("dropout_p", 0.0),
            ("softmax_scale", None),
            ("window_size", None),
        ],
        "get_optimal_context_length": [
            "model_size_b",
            "available_vram_gb",
            ("use_flash_attention", True),
        ],
    },
    "batch_size": {
        "search_batch_size": [
            "model",
            "make_inputs",
            ("max_batch_size", 256),
            ("share", 0.9),
            ("available_bytes", None),
        ],
        "suggest_batch_size": [
            "model_size_b",
            "bits",
            "available_vram_gb",
            ("context_length", 2048),
        ],
    },
    "request_handle": {
        "RequestHandle.result": [("timeout", None)],
        "RequestHandle.cancel": [],
        "RequestHandle.done": [],
        "RequestHandle.tokens": [],
    },
    "speculative": {
        "SpeculativeDecoder": [
            "target_model",
            ("draft_model", None),
            ("gamma", 4),
            ("params", None),
            ("max_ngram", 3),
        ],
        "SpeculativeDecoder.generate_step": ["input_ids"],
        "SpeculativeDecoder.generate": [
            "input_ids",
            ("max_new_tokens", 128),
            ("eos_token_ids", ()),
        ],
    },
    "kv_cache": {
        "KVCache": ["config"],
        "KVCache.update": ["layer_idx", "k", "v", ("positions", None)],
        "KVCache.get": ["layer_idx"],
        "KVCache.clear": [],
        "kv_cache_bytes": ["num_layers", "num_kv_heads", "head_dim", "num_tokens", "dtype"],
        "optimize_kv_cache": ["model"],
        "restore_kv_cache": ["model"],
    },
    "engine": {
        "InferenceEngine": ["model", ("backend", None), ("cache_dtype", None)],
        "InferenceEngine.infer": [
            "prompt",
            ("max_tokens", 128),
            ("temperature", 0.7),
            ("top_p", 0.9),
            ("top_k", 40),
            ("seed", 0),
            ("stop_sequences", None),
            ("min_p", 0.0),
            ("repetition_penalty", 1.0),
            ("system_prompt", None),
        ],
    },
}
DATACLASSES = {
    "batch": {
        "BatchConfig": [
            ("max_batch_size", 8),
            ("max_tokens", 2048),
            ("dynamic_batching", True),
        ]
    },
    "flash_attn": {
        "FlashAttentionConfig": [
            ("enabled", True),
            ("version", 2),
            ("causal", True),
            ("dropout_p", 0.0),
            ("softmax_scale", None),
            ("window_size", None),
        ]
    },
    "kv_cache": {
        "KVCacheConfig": [
            ("max_batch_size", 8),
            ("max_seq_length", 4096),
            ("num_layers", 32),
            ("num_heads", 32),
            ("head_dim", 128),
            ("dtype", torch.float16),
            ("num_kv_heads", None),
            ("device", None),
        ]
    },
    "request_handle": {
        "RequestResult": ["text", "token_ids", "finish_reason", "stats", ("logprobs", None)],
        "RequestStats": [
            "enqueued",
            "started",
            "first_token",
            "last_token",
            "num_prompt_tokens",
            "num_tokens",
            ("cached_tokens", 0),
            ("preemptions", 0),
            ("drafted_tokens", 0),
            ("accepted_tokens", 0),
        ],
    },
    "speculation_config": {
        "SpeculationConfig": [
            ("num_speculative_tokens", 4),
            ("prompt_lookup_max", 4),
            ("prompt_lookup_min", 2),
            ("adaptive", True),
            ("draft_model", None),
        ]
    },
    "speculative": {
        "SpeculationStats": [
            ("steps", 0),
            ("drafted", 0),
            ("accepted", 0),
            ("generated", 0),
        ]
    },
    "engine": {
        "InferResult": [
            "success",
            "text",
            "tokens_generated",
            "latency_ms",
            "tokens_per_sec",
            ("error_message", None),
        ]
    },
}


@pytest.mark.parametrize(("module", "name", "want"), rows(FUNCTIONS))
def test_signatures(module, name, want):
    assert_signature(package, module, name, want)


@pytest.mark.parametrize(("module", "name", "want"), rows(DATACLASSES))
def test_dataclasses(module, name, want):
    assert_fields(package, module, name, want)


def test_paged_cache():
    parameters = list(inspect.signature(package.PagedKVCache).parameters.values())
    assert [p.name for p in parameters[:2]] == ["config", "page_size"]
    assert parameters[1].default == 16
    sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 8}
    assert package.PagedKVCache(num_blocks=2, block_size=4, **sizes).__doc__


def test_every_public_name_is_in_a_table():
    tables = [*FUNCTIONS.values(), *DATACLASSES.values()]
    names = {name for table in tables for name in table if "." not in name}
    newer = {"LogitOptions", "StepStats", "Structures", "Telemetry", "TokenLogprobs"}
    older = {"GenerationStats", "Recording", "RecordingError", "SamplingParams", "TextStream"}
    others = {"FLASH_ATTN_AVAILABLE", "PagedKVCache", "RequestHandle"}
    assert set(package.__all__) == names | newer | older | others
    assert set(package.__all__) <= set(dir(package))
    assert package.FLASH_ATTN_AVAILABLE is package.check_flash_attention_available()


def test_the_engine_is_in_the_module_that_notebooks_import_it_from():
    from llamatelemetry.inference import batch

    assert batch.InferenceEngine is package.InferenceEngine
    assert batch.InferResult is package.InferResult


def test_importing_the_package_loads_none_of_its_modules():
    code = (
        "import sys, llamatelemetry.inference\n"
        "print([m for m in sys.modules if m.startswith(('llamatelemetry.inference.', 'torch'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
