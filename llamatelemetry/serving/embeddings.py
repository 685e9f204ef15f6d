"""/v1/embeddings: vectors of texts, computed between the steps of the requests that generate."""

from __future__ import annotations

import asyncio
import base64
import struct
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator

from llamatelemetry.inference.arguments import ContextLengthError
from llamatelemetry.inference.embedding import groups
from llamatelemetry.inference.submission import token_ids
from llamatelemetry.serving.field_names import named
from llamatelemetry.serving.worker import Worker

MAX_INPUTS = 2048  # of one request, as many as OpenAI's


class EmbeddingRequest(BaseModel):
    """The body of /v1/embeddings.

    Attributes:
        input: text, token ids, or a list of either.
        encoding_format: numbers, or the base64 of little-endian float32.
        dimensions: the model's own, or left out.
        user: without effect.
    """

    model_config = ConfigDict(extra="forbid")

    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @field_validator("input")
    @classmethod
    def _holds_something(cls, given: Any) -> Any:
        one = isinstance(given, str) or all(isinstance(token, int) for token in given)
        several = [given] if one else given
        if not all(several):
            raise ValueError("input must not be empty")
        if len(several) > MAX_INPUTS:
            raise ValueError(f"input must hold at most {MAX_INPUTS} texts, got {len(several)}")
        return several


async def embeddings(body: EmbeddingRequest, model: str, worker: Worker) -> dict[str, Any]:
    """The answer.

    Args:
        body: of a request.
        model: its name.
        worker: whose thread computes the vectors, a forward at a time.

    Raises:
        ValueError: for an input longer than the context, and for dimensions that it has not.
        ServerBusy: as Worker.submit.
    """
    engine, embedder = worker.batcher.engine, worker.embedder
    if body.dimensions not in (None, embedder.size):
        raise ValueError(
            f"dimensions must be the model's {embedder.size} or left out, for its vectors are not "
            f"made to be cut, got {body.dimensions}"
        )
    with named({"prompt": "input"}):
        given: list[Any] = [
            await asyncio.to_thread(engine.prompts.verbatim, one) if isinstance(one, str) else one
            for one in body.input
        ]
    rows = _checked(given, engine)
    vectors = await _vectors(rows, worker)
    count = sum(map(len, rows))
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(v, body.encoding_format)}
            for i, v in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _checked(rows: list[Any], engine: Any) -> list[list[int]]:
    vocab_size = engine.loaded.model.get_input_embeddings().num_embeddings
    context = engine.loaded.context_length
    for i, row in enumerate(rows):
        if not 0 < len(row) <= context:
            raise ContextLengthError(
                f"input[{i}] must have 1 to {context} tokens, the model's context, got {len(row)}"
            )
    return [token_ids("input: a token id", row, vocab_size) for row in rows]


async def _vectors(rows: list[list[int]], worker: Worker) -> list[list[float]]:
    """In the order of the rows."""
    found: list[list[float]] = [[]] * len(rows)

    def embed(group: list[int]) -> list[list[float]]:
        return worker.embedder.embed([rows[i] for i in group])

    with worker.admitted():
        for group in groups(rows, worker.batcher.max_step_tokens):
            vectors = await worker.between_steps(partial(embed, group))
            for i, vector in zip(group, vectors, strict=True):
                found[i] = vector
    return found


def _encoded(vector: list[float], encoding: str) -> Any:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
