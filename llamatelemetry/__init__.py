"""PyTorch custom operators for LLM inference: C++ and CUDA kernels, thin Python.

Importing it loads neither torch nor the libraries; the first use of a name does.
"""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry import cuda as cuda
    from llamatelemetry import inference as inference
    from llamatelemetry import loading as loading
    from llamatelemetry import models as models
    from llamatelemetry import ops as ops
    from llamatelemetry import profiling as profiling
    from llamatelemetry import quantization as quantization
    from llamatelemetry.inference.engine import InferenceEngine as InferenceEngine
    from llamatelemetry.inference.engine import InferResult as InferResult
    from llamatelemetry.inference.sampling import SamplingParams as SamplingParams
    from llamatelemetry.loading.find import LoadedModel as LoadedModel
    from llamatelemetry.loading.find import ModelFileError as ModelFileError
    from llamatelemetry.loading.find import load_model as load_model
    from llamatelemetry.models.patching import PatchReport as PatchReport
    from llamatelemetry.models.patching import patch as patch
    from llamatelemetry.models.patching import unpatch as unpatch

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "cuda": (),
        "inference": (),
        "loading": (),
        "models": (),
        "ops": (),
        "profiling": (),
        "quantization": (),
        "inference.engine": ("InferResult", "InferenceEngine"),
        "inference.sampling": ("SamplingParams",),
        "loading.find": ("LoadedModel", "ModelFileError", "load_model"),
        "models.patching": ("PatchReport", "patch", "unpatch"),
    },
)
