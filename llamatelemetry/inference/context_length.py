"""How long a context fits beside a model in a given memory."""

from __future__ import annotations

import math

from llamatelemetry.inference.arguments import real

GB = 1e9
RESERVED_GB = 1.0  # the CUDA context, cuBLAS workspaces, fragmentation
_SHORTEST, _LONGEST = 512, 32768
_VOCAB = 128 * 1024


def get_optimal_context_length(
    model_size_b: float, available_vram_gb: float, use_flash_attention: bool = True
) -> int:
    """The longest context, a power of two from 512 to 32768, of one float16 sequence that fits.

    Memory (GB are 1e9 bytes) is that of the weights, 2 bytes each, 1 GB that is reserved, and for
    each token its keys and values (``2 · layers · hidden_size`` values of 2 bytes, as without
    grouped queries) and a row of float32 logits over 128 Ki words. Without flash attention each
    layer also writes scores and weights, ``heads · tokens²`` values of 2 bytes each, one layer at
    a time. Layers and widths are those of Llama-like models: ``parameters = 12 · layers ·
    hidden_size²`` with ``hidden_size = 128 · layers`` and heads of 128. Where nothing fits, the
    answer is 512.

    Args:
        model_size_b: Parameters in 1e9.
        available_vram_gb: Memory in GB, weights included.
        use_flash_attention: Whether attention takes no memory that grows with tokens².

    Returns:
        Tokens. More memory never gives fewer, a larger model never more.

    Raises:
        ValueError: A size that is not a positive number.

    Example:
        >>> get_optimal_context_length(1.0, 12.0)
        8192
    """
    for name, size in (("model_size_b", model_size_b), ("available_vram_gb", available_vram_gb)):
        if not (real(f"get_optimal_context_length: {name}", size) > 0 and math.isfinite(size)):
            raise ValueError(
                f"get_optimal_context_length: {name} must be positive and finite, got {size!r}"
            )
    layers = _layers(model_size_b)
    free = (available_vram_gb - 2 * model_size_b - RESERVED_GB) * GB
    per_token = bytes_per_token(model_size_b)
    per_square = 0.0 if use_flash_attention else layers * 2 * 2  # as many heads as layers
    fitting = _SHORTEST
    while fitting < _LONGEST and 2 * fitting * per_token + (2 * fitting) ** 2 * per_square <= free:
        fitting *= 2
    return fitting


def bytes_per_token(model_size_b: float) -> float:
    """Of a token's float16 keys and values and its row of float32 logits; as above."""
    layers = _layers(model_size_b)
    return 2 * layers * (128 * layers) * 2 + _VOCAB * 4


def _layers(model_size_b: float) -> float:
    return (model_size_b * 1e9 / (12 * 128**2)) ** (1 / 3)
