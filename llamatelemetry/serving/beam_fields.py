"""What a request for a search of beams may hold."""

from __future__ import annotations

from typing import Any

from llamatelemetry.serving.structure import ResponseFormat

# Fields that ask for something else than a search does, at the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "logprobs": (False, None),
    "response_format": (None, ResponseFormat(type="text")),
    "structured_outputs": (None,),
}


def is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them, where 0 is not False."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def check_fields(request: Any, given: Any) -> None:
    """Refuses what a search of beams has no use for, and what only it has a use for.

    Args:
        request: Generation.
        given: what the client sent, for the sentence.

    Raises:
        ValueError: naming the field.
    """
    if not request.use_beam_search:
        if request.length_penalty != 1:
            raise ValueError("length_penalty must come with use_beam_search true")
        return
    for name, values in _NEUTRAL.items():
        if not is_among(getattr(request, name, values[0]), values):
            raise ValueError(
                f"{name} must be left out with use_beam_search, got {given[name]!r:.80}"
            )


def check_count(request: Any, most: int) -> None:
    """Refuses more beams than rows.

    Args:
        request: Generation.
        most: rows of a step.

    Raises:
        ValueError: naming the field.
    """
    if request.use_beam_search and request.num_drawn > most:
        raise ValueError(
            f"{request.fields['num_beams']} must be at most {most}, the server's --max-batch-size, "
            f"with use_beam_search, got {request.num_drawn}"
        )
