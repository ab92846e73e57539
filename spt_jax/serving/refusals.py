"""Exception handlers: each error becomes a response with a status and a message of bounded length."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from spt_jax.errors import CheckpointError, ConfigError, DataError, SptError
from spt_jax.serving.bank import UnknownPromptError
from spt_jax.serving.limits import error_body
from spt_jax.serving.prompt_directories import RefusedError
from spt_jax.serving.worker import EngineFailedError, QueueFullError

RETRY_SECONDS = 1
# Limits of a message about an invalid body: problems, characters of a field's name, characters in total.
PROBLEMS, NAME_LENGTH, LENGTH = 10, 60, 2000


def add_handlers(app: FastAPI) -> None:
    """Adds exception handlers that answer in the format of OpenAI's API."""

    def answer(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        text = message.encode(errors="replace").decode()
        text = text if len(text) <= LENGTH else f"{text[:LENGTH]} ..."
        return JSONResponse(error_body(text, kind, **more), status, headers=dict(headers or {}))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return answer(error.status, str(error), code=error.code, param=error.param)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return answer(429, f"{error}; try again later", {"retry-after": str(RETRY_SECONDS)}, code="queue_full")

    @app.exception_handler(EngineFailedError)
    async def failed(_: Request, error: EngineFailedError) -> JSONResponse:
        return answer(503, str(error))

    @app.exception_handler(UnknownPromptError)
    async def unknown(_: Request, error: UnknownPromptError) -> JSONResponse:
        return answer(404, str(error), code="model_not_found", param="model")

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed to answer this request; see its log")

    @app.exception_handler(SptError)
    async def wrong(_: Request, error: SptError) -> JSONResponse:
        known = isinstance(error, (ConfigError, DataError, CheckpointError))
        return answer(400 if known else 500, str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            return answer(400, "the body is not valid JSON: " + "; ".join(map(_reason, problems[:PROBLEMS])))
        by_name: dict[str, list[str]] = {}
        for problem in problems:
            if len(by_name) == PROBLEMS and _field(problem["loc"]) not in by_name:
                break
            by_name.setdefault(_field(problem["loc"]), []).append(problem["msg"])
        texts = [f"{name}: {', or '.join(dict.fromkeys(messages))}" for name, messages in by_name.items()]
        more = ["..."] if sum(map(len, by_name.values())) < len(problems) else []
        return answer(422, "; ".join(texts + more), param=next(iter(by_name)))


def _field(place: Sequence[str | int]) -> str:
    """Returns a field's name from the location of a pydantic error, without the types that pydantic tried."""
    types = ("str", "int", "float", "bool")
    parts = [part for part in place[1:] if isinstance(part, int) or (part.isidentifier() and part not in types)]
    return ".".join(map(str, parts))[:NAME_LENGTH] or "body"


def _reason(problem: Mapping[str, Any]) -> str:
    return str(problem.get("ctx", {}).get("error", problem["msg"]))
