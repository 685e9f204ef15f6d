"""Measuring a model: times of requests, a profile of its forward, memory."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.profiling.memory import DeviceMemory as DeviceMemory
    from llamatelemetry.profiling.memory import check_memory as check_memory
    from llamatelemetry.profiling.metrics import RequestTimes as RequestTimes
    from llamatelemetry.profiling.metrics import percentile as percentile
    from llamatelemetry.profiling.metrics import percentiles as percentiles
    from llamatelemetry.profiling.metrics import summarise as summarise
    from llamatelemetry.profiling.metrics import time_per_output_token as time_per_output_token
    from llamatelemetry.profiling.metrics import time_to_first_token as time_to_first_token
    from llamatelemetry.profiling.model import ModelProfile as ModelProfile
    from llamatelemetry.profiling.model import OpTime as OpTime
    from llamatelemetry.profiling.model import profile_model as profile_model

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "memory": (
            "DeviceMemory",
            "check_memory",
        ),
        "metrics": (
            "RequestTimes",
            "percentile",
            "percentiles",
            "summarise",
            "time_per_output_token",
            "time_to_first_token",
        ),
        "model": (
            "ModelProfile",
            "OpTime",
            "profile_model",
        ),
    },
)
