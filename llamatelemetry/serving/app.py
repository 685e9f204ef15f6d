"""The HTTP server: routes, limits and errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.serving.answers import CHAT, COMPLETION, Answer, Shape, error_body
from llamatelemetry.serving.body_limit import BodyLimit
from llamatelemetry.serving.logprobs import TokenNames
from llamatelemetry.serving.metrics import Metrics
from llamatelemetry.serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    Generation,
)
from llamatelemetry.serving.structure import StructuresOnce, grammar_of
from llamatelemetry.serving.tools import ToolForm, form_of
from llamatelemetry.serving.worker import ServerBusy, Worker

_PAGE = Path(__file__).with_name("chat.html")
_RETRY_AFTER_S = "1"
_Body = TypeVar("_Body", bound=Generation)


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
    """

    model: str
    api_key: str | None = None
    max_open: int = 256
    max_body_bytes: int = 4 << 20
    timeout_s: float = 600.0
    drain_s: float = 30.0
    send_timeout_s: float = 60.0


def create_app(batcher: ContinuousBatching, config: ServerConfig) -> FastAPI:
    """The application, to be run by any ASGI server.

    Args:
        batcher: ContinuousBatching over an InferenceEngine; the application's thread steps it.
        config: ServerConfig.
    """
    worker = Worker(batcher, config.max_open)
    metrics = Metrics(config.model, lambda: worker.num_open)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.drain(config.drain_s)

    app = FastAPI(title="llamatelemetry", lifespan=lifespan, openapi_url=None)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    _add_errors(app)
    service = _Service(worker, metrics, config, StructuresOnce(batcher.engine))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await service.authorized(request, ChatRequest)
        messages = [message.for_template() for message in body.messages]
        tools, form = body.callable_tools, None
        if tools is not None:
            form = form_of(batcher.engine.tokenizer.chat_template)
        ids = await asyncio.to_thread(batcher.engine.encode, messages, None, tools)
        left = batcher.engine.loaded.context_length - len(ids)
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

    served = {
        "id": config.model,
        "object": "model",
        "created": 0,
        "owned_by": "llamatelemetry",
        "max_model_len": batcher.engine.loaded.context_length,
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


@dataclass(frozen=True)
class _Service:
    """What the routes of generations share."""

    worker: Worker
    metrics: Metrics
    config: ServerConfig
    structures: StructuresOnce

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
        if body.model is not None:
            self.check_model(body.model)
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
        grammar = await asyncio.to_thread(
            grammar_of, body.response_format, body.structured_outputs, self.structures
        )
        params = body.sampling(engine.defaults)
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
        )
        follow = partial(self.worker.follow, timeout=self.config.timeout_s)
        names = None if body.num_told is None else TokenNames(engine.tokenizer)
        model = self.config.model
        answer = Answer(shape, model, handles, body.n, len(params), follow, names, form)

        def count() -> None:
            for handle in handles:
                handle.cancel()
                self.metrics.ended(handle)

        if body.stream:
            return EventSourceResponse(
                _then(answer.chunks(body.includes_usage), count),
                send_timeout=self.config.send_timeout_s,
            )
        try:
            return JSONResponse(await _unless_gone(answer.whole(), request))
        finally:
            count()


async def _then(chunks: AsyncIterator[str], end: Any) -> AsyncIterator[dict[str, str]]:
    """The events of a stream; end is called however it ends."""
    try:
        async for data in chunks:
            yield {"data": data}
    finally:
        end()


async def _unless_gone(answer: Any, request: Request) -> Any:
    """An answer, unless its client goes before."""
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()


def _add_errors(app: FastAPI) -> None:
    """Every error in the API's shape."""

    def refuse(status: int, error: BaseException | str, **kind: Any) -> JSONResponse:
        busy = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None
        return JSONResponse({"error": error_body(error, **kind)}, status, headers=busy)

    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union the nearest kind
        where = ".".join(str(part) for part in first["loc"])
        words = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] not in ("value_error", "missing"):
            words += f", got {first['input']!r:.80}"
        return refuse(400, f"{where}: {words}" if where else words, kind="invalid_request_error")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kinds = {401: "authentication_error", 404: "not_found_error"}
        kind = kinds.get(error.status_code, "invalid_request_error")
        code = "model_not_found" if str(error.detail).startswith("model must") else None
        return refuse(error.status_code, str(error.detail), kind=kind, code=code)

    @app.exception_handler(ServerBusy)
    async def busy(_: Request, error: ServerBusy) -> JSONResponse:
        return refuse(429, error, kind="rate_limit_error")

    @app.exception_handler(TimeoutError)
    async def late(_: Request, error: TimeoutError) -> JSONResponse:
        return refuse(504, error, kind="timeout_error")

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        return refuse(400, error)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return refuse(500, error)
