"""Every error of the server in the API's shape."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from llamatelemetry.inference.block_manager import NeverFits, OutOfBlocks
from llamatelemetry.serving.answers import error_body
from llamatelemetry.serving.worker import ServerBusy

_RETRY_AFTER_S = "1"
_FAILURES = (RuntimeError, ArithmeticError, LookupError, OSError, TypeError)
_log = logging.getLogger("llamatelemetry")


def add_errors(app: FastAPI) -> None:
    """Answers errors of an application's routes with their status and a sentence."""

    def refuse(status: int, error: BaseException | str, **kind: Any) -> JSONResponse:
        busy = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None
        return JSONResponse({"error": error_body(error, **kind)}, status, headers=busy)

    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union the nearest kind
        words = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] not in ("value_error", "missing"):
            words += f", got {first['input']!r:.80}"
        return refuse(400, _sentence(first["loc"], words), kind="invalid_request_error")

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

    @app.exception_handler(NeverFits)  # a RuntimeError too
    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        return refuse(400, error)

    async def no_memory(_: Request, error: Exception) -> JSONResponse:
        return refuse(503, error)

    for kind in (OutOfBlocks, torch.OutOfMemoryError, MemoryError):
        app.add_exception_handler(kind, no_memory)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s failed", request.url.path, exc_info=error)
        return refuse(500, error)

    # By their names too: after the handler of Exception itself the connection is closed.
    for failure in (*_FAILURES, Exception):
        app.add_exception_handler(failure, failed)


def _sentence(place: Sequence[str | int], words: str) -> str:
    """words after the field that they are about, which they may begin with themselves.

    Args:
        place: of a ValidationError; pydantic's names of kinds, as list[str] is, are no fields.
    """
    parts = [str(part) for part in place]
    fields = [part for part in parts if not re.fullmatch(r"\[key\]|list\[.*\]", part)]
    if not fields:
        return words
    where, name = ".".join(fields), f"{fields[-1]} "
    return f"{where} {words[len(name) :]}" if words.startswith(name) else f"{where}: {words}"
