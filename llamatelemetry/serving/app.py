"""The HTTP server: routes, limits and errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.embedding import Pooling
from llamatelemetry.serving.answers import CHAT, COMPLETION, Answer, Shape
from llamatelemetry.serving.beam_fields import check_count
from llamatelemetry.serving.body_limit import BodyLimit
from llamatelemetry.serving.embeddings import EmbeddingRequest, embeddings
from llamatelemetry.serving.errors import add_errors
from llamatelemetry.serving.event_stream import EventStream
from llamatelemetry.serving.field_names import named
from llamatelemetry.serving.logprobs import TokenNames
from llamatelemetry.serving.metrics import Metrics
from llamatelemetry.serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    Generation,
)
from llamatelemetry.serving.structure import StructuresOnce, check_ends, grammar_of
from llamatelemetry.serving.tools import ToolForm, form_of
from llamatelemetry.serving.worker import Worker

_PAGE = Path(__file__).with_name("chat.html")
_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class ServerConfig:
    """Limits of a server.

    Attributes:
        model: the name that clients give.
        api_key: what /v1 asks for as a bearer token; None asks for nothing.
        max_open: requests open at once; one more is answered with 429.
        max_body_bytes: of a request.
        timeout_s: of a request, from when it came; its generation is then cancelled.
        drain_s: how long a shutdown waits for open requests.
        send_timeout_s: a client that takes nothing of its stream for so long is left.
        pooling: of embeddings: the "mean" of a text's tokens, or its "last" one.
    """

    model: str
    api_key: str | None = None
    max_open: int = 256
    max_body_bytes: int = 4 << 20
    timeout_s: float = 600.0
    drain_s: float = 30.0
    send_timeout_s: float = 60.0
    pooling: Pooling = "mean"


def create_app(batcher: ContinuousBatching, config: ServerConfig, otel: Any = None) -> FastAPI:
    """The application, to be run by any ASGI server.

    Args:
        batcher: ContinuousBatching over an InferenceEngine; the application's thread steps it.
        config: ServerConfig.
        otel: an OpenTelemetry that is told of every answer.
    """
    worker = Worker(batcher, config.max_open, config.pooling)
    metrics = Metrics(config.model, lambda: worker.num_open, batcher.telemetry)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.drain(config.drain_s)

    app = FastAPI(title="llamatelemetry", lifespan=lifespan, openapi_url=None)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    add_errors(app)
    service = _Service(worker, metrics, config, StructuresOnce(batcher.engine), otel)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await service.authorized(request, ChatRequest)
        messages = [message.for_template() for message in body.messages]
        tools, form = body.callable_tools, None
        if tools is not None:
            form = form_of(batcher.engine.tokenizer.chat_template)
        with named(body.fields):
            ids = await asyncio.to_thread(batcher.engine.encode, messages, None, tools)
        left = batcher.max_model_len(body.beams.get("num_beams", 1)) - len(ids)
        limit = body.limit or max(min(left, DEFAULT_MAX_TOKENS), 1)
        return await service.answer(CHAT, body, [ids], limit, request, form)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await service.authorized(request, CompletionRequest)
        encode = batcher.engine.prompts.verbatim
        prompts = [
            await asyncio.to_thread(encode, p) if isinstance(p, str) else p for p in body.prompts()
        ]
        return await service.answer(COMPLETION, body, prompts, body.limit, request)

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        body = await service.authorized(request, EmbeddingRequest)
        made = embeddings(body, config.model, worker)
        return JSONResponse(await _unless_gone(made, request, config.timeout_s))

    _add_models(app, service, batcher.max_model_len())

    @app.get("/health")
    async def health() -> Response:
        if worker.failure is not None:
            return JSONResponse({"status": "failed", "reason": str(worker.failure)}, 503)
        return JSONResponse({"status": "ok", "open_requests": worker.num_open})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return _PAGE.read_text()

    return app


def _add_models(app: FastAPI, service: _Service, context: int) -> None:
    """The routes that tell of the model that is served."""
    served = {
        "id": service.config.model,
        "object": "model",
        "created": 0,
        "owned_by": "llamatelemetry",
        "max_model_len": context,
    }

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{name:path}")  # the name of a GGUF file has slashes
    async def model(request: Request, name: str) -> dict[str, Any]:
        service.check_key(request)
        service.check_model(name)
        return served


@dataclass(frozen=True)
class _Service:
    """What the routes of generations share."""

    worker: Worker
    metrics: Metrics
    config: ServerConfig
    structures: StructuresOnce
    otel: Any

    def check_key(self, request: Request) -> None:
        """Refuses a request without the key."""
        if self.config.api_key is not None:
            given = request.headers.get("authorization", "")
            wanted = f"Bearer {self.config.api_key}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                raise HTTPException(401, "the API key is missing or wrong")

    async def authorized(self, request: Request, kind: type[_Body]) -> _Body:
        """The body of a request with the right key, for a model that is served.

        Raises:
            HTTPException, ValueError: which of it is not so.
        """
        self.check_key(request)
        raw = await request.body()  # whatever content type a client names
        try:
            values = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body must be JSON: {error}") from None
        body = kind.model_validate(values)
        if (name := getattr(body, "model", None)) is not None:
            self.check_model(name)
        return body

    def check_model(self, name: str) -> None:
        """Refuses the name of a model that is not served."""
        if name != self.config.model:
            raise HTTPException(404, f"model must be {self.config.model}, got {name!r:.80}")

    async def answer(
        self,
        shape: Shape,
        body: Generation,
        prompts: list[Any],
        limit: int,
        request: Request,
        form: ToolForm | None = None,
    ) -> Response:
        """Submits the answers to each prompt, and answers with their texts or a stream of them."""
        engine = self.worker.batcher.engine
        check_ends(body, limit)
        grammar = await asyncio.to_thread(
            grammar_of, body.response_format, body.structured_outputs, self.structures
        )
        params = body.sampling(engine.defaults)
        check_count(body, self.worker.batcher.max_batch_size)
        with named(body.fields):
            handles = self.worker.submit(
                prompts,
                params,
                max_tokens=limit,
                min_tokens=body.min_tokens,
                stop_sequences=body.stop,
                stop_token_ids=body.stop_token_ids,
                ignore_eos=body.ignore_eos,
                priority=body.priority,
                logits=body.options(grammar),
                shown_tokens=() if form is None else form.shown,
                speculate=not body.disable_spec_decode,
                **body.beams,
            )
        follow = partial(self.worker.follow, timeout=self.config.timeout_s)
        names = None if body.num_told is None else TokenNames(engine.tokenizer)
        model = self.config.model
        answer = Answer(shape, model, handles, body.n, len(params), follow, names, form)

        def count() -> None:
            for handle in handles:
                handle.cancel()
                self.metrics.ended(handle)
            if self.otel is not None:
                asked = {
                    "max_tokens": limit,
                    "seed": body.seed,
                    "temperature": params[0].temperature,
                    "top_p": params[0].top_p,
                    "choice.count": body.n,
                }
                usage, headers = answer.usage(), request.headers
                self.otel.answered(shape.operation, handles, usage, asked, headers)

        if body.stream:
            return EventStream(
                answer.chunks(body.includes_usage),
                count,
                send_timeout_s=self.config.send_timeout_s,
                drain_s=self.config.drain_s,
            )
        try:
            return JSONResponse(await _unless_gone(answer.whole(), request))
        finally:
            count()


async def _unless_gone(
    answer: Awaitable[Any], request: Request, timeout_s: float = math.inf
) -> Any:
    """An answer, unless its client goes or the time is over before."""
    task, end = asyncio.ensure_future(answer), time.monotonic() + timeout_s
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
            if not task.done() and time.monotonic() > end:
                raise TimeoutError(f"the request must end within {timeout_s} s")
        return task.result()
    finally:
        task.cancel()
