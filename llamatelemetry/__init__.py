"""PyTorch custom operators for LLM inference: C++ and CUDA kernels, thin Python."""

from llamatelemetry import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]
