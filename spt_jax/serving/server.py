"""The HTTP server: OpenAI's endpoints over a bank of prompts, where a request's `model` names the prompt."""

import asyncio
import contextlib
import functools
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from spt_jax.errors import CheckpointError, ConfigError, DataError, SptError
from spt_jax.evaluation import log_softmax
from spt_jax.serving import protocol as api
from spt_jax.serving.answers import Answer, Choice, chat_logprobs, completion_logprobs
from spt_jax.serving.bank import UnknownPromptError
from spt_jax.serving.limits import BodyLimits, error_body
from spt_jax.serving.metrics import CountedResponses
from spt_jax.serving.service import RefusedError, Service
from spt_jax.serving.worker import EngineFailedError, QueueFullError

RETRY_SECONDS = 1


class Events(StreamingResponse):
    """A stream of events whose answer is cancelled whatever ends it, a client that left before it began too."""

    def __init__(self, pieces: AsyncGenerator[str], answer: Answer):
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._pieces, self._answer = pieces, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()
            self._answer.cancel()


_ERRORS: Any = {status: {"model": api.ErrorResponse} for status in (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)}
router = APIRouter(responses=_ERRORS)


def _service(request: Request) -> Service:
    return request.app.state.service


@router.post("/v1/completions", response_model=api.Completion)
async def completions(body: api.CompletionRequest, request: Request) -> Any:
    """Continues texts under the prompt that `model` names, or under none."""
    service = _service(request)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    requests = await asyncio.to_thread(
        lambda: service.ask(body, service.records(body.model, texts, body.fields), body.max_tokens, body.logprobs or 0)
    )
    answer = await Answer.begin(service.worker, requests, service.metrics, each=body.n, grows=body.stream)
    shared = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def logprobs(choice: Choice, since: int = 0) -> api.CompletionLogprobs | None:
        return None if body.logprobs is None else completion_logprobs(choice, since)

    if body.stream:

        async def events() -> AsyncGenerator[api.Completion]:
            async with contextlib.aclosing(answer.changes()) as changes:
                async for index, text, since, finished in changes:
                    own = logprobs(answer.choices[index], since)
                    piece = api.CompletionChoice(index=index, text=text, logprobs=own, finish_reason=finished)
                    yield api.Completion(**shared, choices=[piece])
            if body.stream_options and body.stream_options.include_usage:
                yield api.Completion(**shared, choices=[], usage=answer.usage())

        return _streamed(events(), answer)
    await _whole(answer, request)
    choices = [
        api.CompletionChoice(index=i, text=own.text, logprobs=logprobs(own), finish_reason=own.finished)
        for i, own in enumerate(answer.choices)
    ]
    return api.Completion(**shared, choices=choices, usage=answer.usage())


@router.post("/v1/chat/completions", response_model=api.ChatCompletion)
async def chat_completions(body: api.ChatRequest, request: Request) -> Any:
    """Answers a chat under the prompt that `model` names, or under none."""
    service = _service(request)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RefusedError(422, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise RefusedError(422, "top_logprobs goes with logprobs: true", param="top_logprobs")
    limit = body.max_completion_tokens or body.max_tokens
    requests = await asyncio.to_thread(
        lambda: service.ask(body, [service.chat_record(body.model, body.messages)], limit, body.top_logprobs)
    )
    answer = await Answer.begin(service.worker, requests, service.metrics, each=body.n, grows=body.stream)
    shared = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def logprobs(choice: Choice, since: int = 0) -> api.ChatLogprobs | None:
        return chat_logprobs(choice, since) if body.logprobs else None

    if body.stream:

        async def events() -> AsyncGenerator[api.ChatChunk]:
            for index in range(len(answer.choices)):
                first = api.ChunkChoice(index=index, delta=api.Delta(role="assistant", content=""))
                yield api.ChatChunk(**shared, choices=[first])
            async with contextlib.aclosing(answer.changes()) as changes:
                async for index, text, since, finished in changes:
                    own = logprobs(answer.choices[index], since)
                    delta = api.Delta(content=text) if text else api.Delta()
                    piece = api.ChunkChoice(index=index, delta=delta, logprobs=own, finish_reason=finished)
                    yield api.ChatChunk(**shared, choices=[piece])
            if body.stream_options and body.stream_options.include_usage:
                yield api.ChatChunk(**shared, choices=[], usage=answer.usage())

        return _streamed(events(), answer)
    await _whole(answer, request)
    choices = [
        api.ChatChoice(
            index=i, message=api.ChatMessage(content=own.text), logprobs=logprobs(own), finish_reason=own.ended
        )
        for i, own in enumerate(answer.choices)
    ]
    return api.ChatCompletion(**shared, choices=choices, usage=answer.usage())


def _streamed(pieces: AsyncGenerator[Any], answer: Answer) -> Events:
    async def events() -> AsyncGenerator[str]:
        try:
            async for piece in pieces:
                content = piece.model_dump(exclude_none=True)
                for choice in content["choices"]:
                    choice.setdefault("finish_reason", None)
                yield f"data: {json.dumps(content)}\n\n"
            yield "data: [DONE]\n\n"
        except SptError as error:  # the status is long sent
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
        finally:
            await pieces.aclose()

    return Events(events(), answer)


async def _whole(answer: Answer, request: Request) -> None:
    """Waits for an answer as long as the client does."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, left = asyncio.ensure_future(answer.finish()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise RefusedError(499, "the client has gone")
        done.result()
    finally:
        done.cancel()
        left.cancel()
        answer.cancel()


@router.post("/v1/classify", response_model=api.Classification)
async def classify(body: api.ClassifyRequest, request: Request) -> Any:
    """The class of every text, and the log-probability of each."""
    service = _service(request)
    name = service.known(body.model)
    if name is None:
        raise RefusedError(400, f"{body.model!r} is the bare base, which has no classes", param="model")
    given = [body.input] if isinstance(body.input, str) else body.input

    def run() -> list[dict[str, float]]:
        records = [
            own
            for one in given
            for own in service.records(body.model, *(([one], None) if isinstance(one, str) else (None, one)))
        ]
        return service.classifier.classify(name, records)

    with service.place_to_classify(), service.metrics.classifying(len(given)):
        found = await asyncio.get_running_loop().run_in_executor(service.classifying, run)
    data = [
        api.Classified(
            index=i,
            label=max(scores, key=lambda own: scores[own]),
            log_probabilities=scores,
            probabilities=_shares(scores),
        )
        for i, scores in enumerate(found)
    ]
    return api.Classification(model=body.model, data=data)


def _shares(scores: Mapping[str, float]) -> dict[str, float]:
    values = np.exp(log_softmax(np.asarray([list(scores.values())])))[0]
    return dict(zip(scores, values.tolist(), strict=True))


@router.get("/v1/models", response_model=api.Models)
async def models(request: Request) -> Any:
    """The base and every prompt."""
    service = _service(request)
    return api.Models(data=[service.model(name) for name in (None, *service.bank.names)])


@router.get("/v1/models/{name}", response_model=api.Model)
async def model(name: str, request: Request) -> Any:
    """One of them."""
    service = _service(request)
    return service.model(service.known(name))


def _check_admin(request: Request) -> None:
    service = _service(request)
    if service.admin_key is None:
        raise RefusedError(403, "the server was started without an admin key, so prompts cannot be changed")
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode("latin-1"), service.admin_key.encode()):
        raise RefusedError(401, "give the admin key as Authorization: Bearer KEY", code="invalid_api_key")


@router.post("/v1/prompts", response_model=api.Model, status_code=201)
async def add_prompt(request: Request, body: api.AddPrompt) -> Any:
    """Loads, or loads anew, a prompt directory of the server's. Requests under way keep what they had."""
    service = _service(request)
    _check_admin(request)
    await asyncio.to_thread(service.load, body.name)
    await asyncio.to_thread(service.warm, body.name)
    return service.model(body.name)


@router.delete("/v1/prompts/{name}", response_model=api.Deleted)
async def remove_prompt(name: str, request: Request) -> Any:
    """Forgets a prompt; its files stay."""
    service = _service(request)
    _check_admin(request)
    if service.known(name) is None:
        raise RefusedError(422, f"{name!r} is the base", param="name")
    service.remove(name)
    return api.Deleted(id=name, deleted=True)


@router.get("/healthz", response_model=api.Health)
async def healthz(request: Request) -> Any:
    """Whether the process can answer at all."""
    if _service(request).worker.failure is not None:
        raise RefusedError(503, str(_service(request).worker.failure))
    return api.Health()


@router.get("/readyz", response_model=api.Health)
async def readyz(request: Request) -> Any:
    """Whether to send requests here: base and prompts were loaded before the first connection."""
    return await healthz(request)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Any:
    """Counters and gauges, as Prometheus reads them."""
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@functools.cache
def _page() -> str:
    return (resources.files("spt_jax") / "assets" / "playground.html").read_text(encoding="utf-8")


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def playground() -> Any:
    """A page on which models answer side by side."""
    return HTMLResponse(_page(), headers={"cache-control": "no-cache"})


def make_app(service: Service, *, max_body_bytes: int = 2**20, body_seconds: float = 30.0) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
      service: what it serves; its worker has been started.
      max_body_bytes: of a request.
      body_seconds: in which a request's body must have come.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="spt_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(BodyLimits, max_bytes=max_body_bytes, seconds=body_seconds)
    app.add_middleware(CountedResponses, counter=service.metrics.responses)

    def answer(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, **more), status, headers=dict(headers or {}))

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
        return answer(500, "the server has failed at this request; its log says why")

    @app.exception_handler(SptError)
    async def wrong(_: Request, error: SptError) -> JSONResponse:
        known = isinstance(error, (ConfigError, DataError, CheckpointError))
        return answer(400 if known else 500, str(error))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            return answer(400, "the body is no JSON: " + "; ".join(_said(problem) for problem in problems))
        if "json" not in request.headers.get("content-type", "json"):
            return answer(422, "body: send it as JSON, with the header Content-Type: application/json")
        by_name: dict[str, list[str]] = {}
        for problem in problems:
            by_name.setdefault(_field(problem["loc"]), []).append(problem["msg"])
        texts = [f"{name}: {', or '.join(dict.fromkeys(messages))}" for name, messages in by_name.items()]
        return answer(422, "; ".join(texts), param=next(iter(by_name)))

    return app


def bound(host: str, port: int) -> socket.socket:
    """A socket that `run` will listen on; port 0 takes a free one.

    Raises:
      ConfigError: the address is not to be had.
    """
    own = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
    except (OSError, OverflowError) as error:
        own.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return own


def run(app: FastAPI, listening: socket.socket, *, drain_seconds: int) -> None:
    """Serves until SIGTERM or SIGINT, then answers what is under way."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=drain_seconds, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def _field(place: Sequence[str | int]) -> str:
    """The name of a field from where pydantic found it wrong, without the types that it tried."""
    types = ("str", "int", "float", "bool")
    parts = [part for part in place[1:] if isinstance(part, int) or (part.isidentifier() and part not in types)]
    return ".".join(map(str, parts)) or "body"


def _said(problem: Mapping[str, Any]) -> str:
    return str(problem.get("ctx", {}).get("error", problem["msg"]))
