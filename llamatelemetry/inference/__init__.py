"""Generation: recordings, the engine and what it is made of."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.inference.engine import GenerationStats as GenerationStats
    from llamatelemetry.inference.engine import InferenceEngine as InferenceEngine
    from llamatelemetry.inference.engine import InferResult as InferResult
    from llamatelemetry.inference.recording import Recording as Recording
    from llamatelemetry.inference.recording import RecordingError as RecordingError
    from llamatelemetry.inference.sampling import SamplingParams as SamplingParams
    from llamatelemetry.inference.text_stream import TextStream as TextStream

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "engine": ("GenerationStats", "InferResult", "InferenceEngine"),
        "recording": ("Recording", "RecordingError"),
        "sampling": ("SamplingParams",),
        "text_stream": ("TextStream",),
    },
)
