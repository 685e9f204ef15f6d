"""Generation: the engine, key-value caches, attention of whole models, recordings."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.inference.batch import BatchConfig as BatchConfig
    from llamatelemetry.inference.batch import BatchInferenceOptimizer as BatchInferenceOptimizer
    from llamatelemetry.inference.batch import ContinuousBatching as ContinuousBatching
    from llamatelemetry.inference.batch import (
        batch_inference_optimized as batch_inference_optimized,
    )
    from llamatelemetry.inference.batch_size import search_batch_size as search_batch_size
    from llamatelemetry.inference.batch_size import suggest_batch_size as suggest_batch_size
    from llamatelemetry.inference.drawing import TokenLogprobs as TokenLogprobs
    from llamatelemetry.inference.engine import GenerationStats as GenerationStats
    from llamatelemetry.inference.engine import InferenceEngine as InferenceEngine
    from llamatelemetry.inference.engine import InferResult as InferResult
    from llamatelemetry.inference.flash_attn import FLASH_ATTN_AVAILABLE as FLASH_ATTN_AVAILABLE
    from llamatelemetry.inference.flash_attn import FlashAttentionConfig as FlashAttentionConfig
    from llamatelemetry.inference.flash_attn import (
        check_flash_attention_available as check_flash_attention_available,
    )
    from llamatelemetry.inference.flash_attn import (
        disable_flash_attention as disable_flash_attention,
    )
    from llamatelemetry.inference.flash_attn import enable_flash_attention as enable_flash_attention
    from llamatelemetry.inference.flash_attn import (
        flash_attention_forward as flash_attention_forward,
    )
    from llamatelemetry.inference.flash_attn import (
        get_optimal_context_length as get_optimal_context_length,
    )
    from llamatelemetry.inference.kv_cache import KVCache as KVCache
    from llamatelemetry.inference.kv_cache import KVCacheConfig as KVCacheConfig
    from llamatelemetry.inference.kv_cache import PagedKVCache as PagedKVCache
    from llamatelemetry.inference.kv_cache import kv_cache_bytes as kv_cache_bytes
    from llamatelemetry.inference.kv_cache import optimize_kv_cache as optimize_kv_cache
    from llamatelemetry.inference.kv_cache import restore_kv_cache as restore_kv_cache
    from llamatelemetry.inference.logit_options import LogitOptions as LogitOptions
    from llamatelemetry.inference.recording import Recording as Recording
    from llamatelemetry.inference.recording import RecordingError as RecordingError
    from llamatelemetry.inference.request_handle import RequestHandle as RequestHandle
    from llamatelemetry.inference.request_handle import RequestResult as RequestResult
    from llamatelemetry.inference.request_handle import RequestStats as RequestStats
    from llamatelemetry.inference.sampling import SamplingParams as SamplingParams
    from llamatelemetry.inference.speculation_config import SpeculationConfig as SpeculationConfig
    from llamatelemetry.inference.speculative import SpeculationStats as SpeculationStats
    from llamatelemetry.inference.speculative import SpeculativeDecoder as SpeculativeDecoder
    from llamatelemetry.inference.structured import Structures as Structures
    from llamatelemetry.inference.telemetry import StepStats as StepStats
    from llamatelemetry.inference.telemetry import Telemetry as Telemetry
    from llamatelemetry.inference.text_stream import TextStream as TextStream

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "batch": (
            "BatchConfig",
            "BatchInferenceOptimizer",
            "ContinuousBatching",
            "batch_inference_optimized",
        ),
        "batch_size": (
            "search_batch_size",
            "suggest_batch_size",
        ),
        "drawing": ("TokenLogprobs",),
        "engine": (
            "GenerationStats",
            "InferResult",
            "InferenceEngine",
        ),
        "flash_attn": (
            "FLASH_ATTN_AVAILABLE",
            "FlashAttentionConfig",
            "check_flash_attention_available",
            "disable_flash_attention",
            "enable_flash_attention",
            "flash_attention_forward",
            "get_optimal_context_length",
        ),
        "kv_cache": (
            "KVCache",
            "KVCacheConfig",
            "PagedKVCache",
            "kv_cache_bytes",
            "optimize_kv_cache",
            "restore_kv_cache",
        ),
        "logit_options": ("LogitOptions",),
        "recording": (
            "Recording",
            "RecordingError",
        ),
        "request_handle": (
            "RequestHandle",
            "RequestResult",
            "RequestStats",
        ),
        "sampling": ("SamplingParams",),
        "speculation_config": ("SpeculationConfig",),
        "speculative": (
            "SpeculationStats",
            "SpeculativeDecoder",
        ),
        "structured": ("Structures",),
        "telemetry": (
            "StepStats",
            "Telemetry",
        ),
        "text_stream": ("TextStream",),
    },
)
