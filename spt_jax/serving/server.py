"""The HTTP server: OpenAI's endpoints for a bank of prompts; a request's `model` is the name of a prompt."""

import asyncio
import contextlib
import functools
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from importlib import resources
from typing import Any

import numpy as np
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from spt_jax.errors import ConfigError, SptError
from spt_jax.evaluation.evaluate import log_softmax
from spt_jax.serving import protocol as api
from spt_jax.serving.answers import Answer, Choice, chat_logprobs, completion_logprobs
from spt_jax.serving.class_answers import class_chat, class_completion
from spt_jax.serving.fairness import sender_of
from spt_jax.serving.hosts import LOOPBACK, BrowserChecks
from spt_jax.serving.limits import BodyLimits, error_body, timed_heads
from spt_jax.serving.metrics import CountedResponses
from spt_jax.serving.prompt_directories import RefusedError
from spt_jax.serving.refusals import add_handlers
from spt_jax.serving.service import Service


class Events(StreamingResponse):
    """A stream of events that cancels its answer however it ends, even if the client disconnects before the start."""

    def __init__(self, pieces: AsyncGenerator[str], answer: Answer):
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._pieces, self._answer = pieces, answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()
            self._answer.cancel()


_STATUSES = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
_ERRORS: Any = {status: {"model": api.ErrorResponse} for status in _STATUSES}
router = APIRouter(responses=_ERRORS)


def _service(request: Request) -> Service:
    return request.app.state.service


@router.post("/v1/completions", response_model=api.Completion)
async def completions(body: api.CompletionRequest, request: Request) -> Any:
    """Continues texts under the prompt named by `model`, or under the bare base. A classifier answers their classes."""
    service, sender = _service(request), sender_of(request.scope)
    if body.max_tokens == 0 and not body.echo:
        raise RefusedError(422, "max_tokens is 0, which is only allowed with echo: true", param="max_tokens")
    if body.stream and body.echo:
        raise RefusedError(422, "echo cannot be combined with stream: true", param="echo")

    def records() -> list[dict[str, Any]]:
        service.worker.check_room(body.n * len(body.texts or [0]), sender.client)
        return service.records(body.model, body.texts, body.fields)

    asked = await asyncio.to_thread(records)
    if service.classifies(body.model):
        return await class_completion(service, body, asked, sender)
    alternatives = body.logprobs or 0
    echoes = await service.echo(body.model, asked, body.logprobs, sender) if body.echo else []
    shared = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    if body.max_tokens == 0:
        found = [echo for echo in echoes for _ in range(body.n)]
        tokens = sum(echo.prompt_tokens for echo in echoes)
        usage = api.Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)
        return await _json(
            api.Completion(**shared, choices=[], usage=usage),
            lambda i: _completion_choice(body, i, found[i].choice),
            len(found),
        )
    requests = await service.read(
        sender, asked, lambda: service.ask(body, asked, body.max_tokens, alternatives, sender)
    )
    answer = await Answer.begin(service.worker, requests, service.metrics, each=body.n, grows=body.stream)

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
    fronts = [echo.choice for echo in echoes for _ in range(body.n)] or [None] * len(answer.choices)
    return await _json(
        api.Completion(**shared, choices=[], usage=answer.usage()),
        lambda i: _completion_choice(body, i, fronts[i], answer.choices[i]),
        len(answer.choices),
    )


def _completion_choice(body: api.CompletionRequest, index: int, *parts: Choice | None) -> api.CompletionChoice:
    """Returns a choice made of an echoed prompt and an answer, or of one of them."""
    given, text, logprobs = [part for part in parts if part is not None], "", None
    for part in given:
        if body.logprobs is not None:
            more = completion_logprobs(part, offset=len(text))
            logprobs = more if logprobs is None else _joined(logprobs, more)
        text += part.text
    return api.CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=given[-1].finished)


def _joined(first: api.CompletionLogprobs, second: api.CompletionLogprobs) -> api.CompletionLogprobs:
    top = None if second.top_logprobs is None else [*(first.top_logprobs or []), *second.top_logprobs]
    return api.CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        text_offset=first.text_offset + second.text_offset,
        top_logprobs=top,
    )


@router.post("/v1/chat/completions", response_model=api.ChatCompletion)
async def chat_completions(body: api.ChatRequest, request: Request) -> Any:
    """Answers a chat under the prompt named by `model`, or under the bare base; a classifier answers its class."""
    service, sender = _service(request), sender_of(request.scope)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RefusedError(422, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    if body.top_logprobs and not body.logprobs:
        raise RefusedError(422, "top_logprobs needs logprobs: true", param="top_logprobs")
    limit = body.max_completion_tokens or body.max_tokens

    def records() -> list[dict[str, Any]]:
        service.worker.check_room(body.n, sender.client)
        return [service.chat_record(body.model, body.messages)]

    asked = await asyncio.to_thread(records)
    if service.classifies(body.model):
        return await class_chat(service, body, asked, sender)
    requests = await service.read(sender, asked, lambda: service.ask(body, asked, limit, body.top_logprobs, sender))
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

    def choice(index: int) -> api.ChatChoice:
        own = answer.choices[index]
        message = api.ChatMessage(content=own.text)
        return api.ChatChoice(index=index, message=message, logprobs=logprobs(own), finish_reason=own.ended)

    whole = api.ChatCompletion(**shared, choices=[], usage=answer.usage())
    return await _json(whole, choice, len(answer.choices))


async def _json(whole: BaseModel, choice: Callable[[int], BaseModel], count: int) -> Response:
    """Returns a response with choices, serialized one by one in another thread, since they can be many megabytes."""

    def content() -> str:
        outer = json.dumps(whole.model_dump(exclude={"choices"}, exclude_none=True))
        return f'{outer[:-1]}, "choices": [{", ".join(choice(i).model_dump_json() for i in range(count))}]}}'

    return Response(await asyncio.to_thread(content), media_type="application/json")


def _streamed(pieces: AsyncGenerator[Any], answer: Answer) -> Events:
    async def events() -> AsyncGenerator[str]:
        try:
            async for piece in pieces:
                content = piece.model_dump(exclude_none=True)
                for choice in content["choices"]:
                    choice.setdefault("finish_reason", None)
                yield f"data: {json.dumps(content)}\n\n"
            yield "data: [DONE]\n\n"
        except SptError as error:  # the status has already been sent
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
        finally:
            await pieces.aclose()

    return Events(events(), answer)


async def _whole(answer: Answer, request: Request) -> None:
    """Waits for an answer, and cancels it if the client disconnects.

    Raises:
      RefusedError: the client has disconnected.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    finishing, leaving = asyncio.ensure_future(answer.finish()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({finishing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not finishing.done():
            raise RefusedError(499, "the client has disconnected")
        finishing.result()
    finally:
        finishing.cancel()
        leaving.cancel()
        answer.cancel()


@router.post("/v1/classify", response_model=api.Classification)
async def classify(body: api.ClassifyRequest, request: Request) -> Any:
    """Returns the class of each text and the log-probabilities of all classes."""
    service, sender = _service(request), sender_of(request.scope)
    given = [body.input] if isinstance(body.input, str) else body.input

    def records() -> tuple[str, list[dict[str, Any]]]:
        name = service.known(body.model)
        if name is None:
            raise RefusedError(400, f"{body.model!r} is the bare base, which has no classes", param="model")
        parts = [([one], None) if isinstance(one, str) else (None, one) for one in given]
        return name, [record for part in parts for record in service.records(name, *part)]

    name, asked = await asyncio.to_thread(records)
    with service.metrics.classifying(len(given)):
        found = await service.classify(name, asked, sender)
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
    """Lists the base and all prompts."""
    service = _service(request)
    bare = [None] if service.bank.base.layout.generates else []
    return api.Models(data=[service.model(name) for name in (*bare, *service.bank.names)])


@router.get("/v1/models/{name}", response_model=api.Model)
async def model(name: str, request: Request) -> Any:
    """Describes the base or one prompt."""
    service = _service(request)
    return service.model(service.known(name))


def _check_admin(request: Request) -> None:
    service = _service(request)
    if service.admin_key is None:
        raise RefusedError(403, "the server was started without an admin key, so prompts cannot be changed")
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), service.admin_key.encode())
    if kind.lower() != "bearer" or not right:
        raise RefusedError(401, "send the admin key as Authorization: Bearer KEY", code="invalid_api_key")


@router.post("/v1/prompts", response_model=api.Model, status_code=201)
async def add_prompt(request: Request, body: api.AddPrompt) -> Any:
    """Loads or reloads a prompt from the server's directory of prompts. Running requests are not affected."""
    service = _service(request)
    _check_admin(request)
    await asyncio.to_thread(service.load, body.name)
    await asyncio.to_thread(service.warm, body.name)
    return service.model(body.name)


@router.delete("/v1/prompts/{name}", response_model=api.Deleted)
async def remove_prompt(name: str, request: Request) -> Any:
    """Removes a prompt from the server; its files stay."""
    service = _service(request)
    _check_admin(request)
    if service.known(name) is None:
        raise RefusedError(422, f"{name!r} is the base, which cannot be removed", param="name")
    service.remove(name)
    return api.Deleted(id=name, deleted=True)


@router.get("/healthz", response_model=api.Health)
async def healthz(request: Request) -> Any:
    """Reports whether the engine is running."""
    if _service(request).worker.failure is not None:
        raise RefusedError(503, str(_service(request).worker.failure))
    return api.Health(compiling=_service(request).worker.compilations.count)


@router.get("/readyz", response_model=api.Health)
async def readyz(request: Request) -> Any:
    """Reports whether the server accepts requests; base and prompts are loaded before it listens."""
    return await healthz(request)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Any:
    """Returns the metrics in Prometheus format."""
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@functools.cache
def _page() -> str:
    return (resources.files("spt_jax") / "assets" / "playground.html").read_text(encoding="utf-8")


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def playground() -> Any:
    """Serves a page that shows the answers of models side by side. Other pages cannot show it in a frame."""
    frames = {"content-security-policy": "frame-ancestors 'none'", "x-frame-options": "DENY"}
    return HTMLResponse(_page(), headers={"cache-control": "no-cache", **frames})


def make_app(
    service: Service,
    *,
    max_body_bytes: int = 2**20,
    body_seconds: float = 30.0,
    hosts: Collection[str] | None = LOOPBACK,
) -> FastAPI:
    """Returns the application, for uvicorn or any other ASGI server.

    Args:
      service: the service; its worker must have been started.
      max_body_bytes: the largest body of a request.
      body_seconds: the time limit for a request's body.
      hosts: names and addresses under which browsers may use the server, as from `hosts.allowed_hosts`; None for any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="spt_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(BrowserChecks, hosts=hosts)
    app.add_middleware(BodyLimits, max_bytes=max_body_bytes, seconds=body_seconds)
    app.add_middleware(CountedResponses, counter=service.metrics.responses)

    add_handlers(app)
    return app


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address; port 0 takes a free port.

    Raises:
      ConfigError: the address is not available.
    """
    bound_socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind((host, port))
    except (OSError, OverflowError) as error:
        bound_socket.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return bound_socket


def server_of(app: FastAPI, *, head_seconds: float = 30.0, drain_seconds: int = 60) -> uvicorn.Server:
    """Returns a server that runs until SIGTERM or SIGINT and then completes the running requests.

    Args:
      app: the application, from `make_app`.
      head_seconds: the time limit for a request's head.
      drain_seconds: the time limit for running requests after the signal.
    """
    config = uvicorn.Config(
        app,
        http=timed_heads(head_seconds),
        log_level="warning",
        timeout_graceful_shutdown=drain_seconds,
        server_header=False,
        port=0,
    )
    return uvicorn.Server(config)
