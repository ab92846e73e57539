"""Answers of prompts that classify, in the formats of the completion endpoints: the text is the likeliest class."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from spt_jax.serving import protocol as api
from spt_jax.serving.fairness import Sender
from spt_jax.serving.prompt_directories import RefusedError
from spt_jax.serving.service import Service


def class_note(model: str) -> str:
    """Returns the note of a response whose texts are classes."""
    return (
        f"{model!r} is a classifier: the answer is its likeliest class, and sampling options have no effect;"
        " /v1/classify returns the probabilities of all classes"
    )


async def class_completion(
    service: Service, body: api.CompletionRequest, records: Sequence[Mapping[str, Any]], sender: Sender
) -> Response:
    """Answers texts with their likeliest classes, in the format of the completions API.

    Raises:
      RefusedError: the request asks for something that a class does not have.
      QueueFullError, ConfigError, DataError: as in `Service.classify`.
    """
    _check(body.model, echo=body.echo, logprobs=body.logprobs is not None)
    if any(not isinstance(value, str) for record in records for value in record.values()):
        raise RefusedError(422, f"{body.model!r} classifies texts and does not take token ids", param="prompt")
    labels, usage = await _classes(service, body.model, records, sender)
    shared = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    shared["note"] = class_note(body.model)
    choices = [
        api.CompletionChoice(index=index, text=label, finish_reason="stop")
        for index, label in enumerate(label for label in labels for _ in range(body.n))
    ]
    if not body.stream:
        return _whole(api.Completion(**shared, choices=choices, usage=usage))
    pieces: list[BaseModel] = [api.Completion(**shared, choices=[choice]) for choice in choices]
    if _wants_usage(body):
        pieces.append(api.Completion(**shared, choices=[], usage=usage))
    return _streamed(pieces)


async def class_chat(
    service: Service, body: api.ChatRequest, records: Sequence[Mapping[str, Any]], sender: Sender
) -> Response:
    """Answers a chat with its likeliest class. Raises as `class_completion` does."""
    _check(body.model, logprobs=bool(body.logprobs))
    (label,), usage = await _classes(service, body.model, records, sender)
    shared = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    shared["note"] = class_note(body.model)
    if not body.stream:
        message = api.ChatMessage(content=label)
        choices = [api.ChatChoice(index=index, message=message, finish_reason="stop") for index in range(body.n)]
        return _whole(api.ChatCompletion(**shared, choices=choices, usage=usage))
    pieces: list[BaseModel] = []
    for index in range(body.n):
        first = api.ChunkChoice(index=index, delta=api.Delta(role="assistant", content=label))
        last = api.ChunkChoice(index=index, delta=api.Delta(), finish_reason="stop")
        pieces += [api.ChatChunk(**shared, choices=[choice]) for choice in (first, last)]
    if _wants_usage(body):
        pieces.append(api.ChatChunk(**shared, choices=[], usage=usage))
    return _streamed(pieces)


def _check(model: str, **asked: bool) -> None:
    for name, given in asked.items():
        if given:
            raise RefusedError(
                422,
                f"{model!r} is a classifier, and {name} is not available; /v1/classify returns the probabilities of"
                " all classes",
                param=name,
            )


async def _classes(
    service: Service, model: str, records: Sequence[Mapping[str, Any]], sender: Sender
) -> tuple[list[str], api.Usage]:
    """Returns the likeliest class of each record, and the number of tokens of their prompts."""
    name = service.known(model)
    assert name is not None  # the bare base has no classes
    encoder = service.bank.entry(name).encoder
    with service.metrics.classifying(len(records)):
        found = await service.classify(name, records, sender)
    tokens = await service.read(sender, records, lambda: sum(len(encoder.prompt_ids(record)) for record in records))
    labels = [max(scores, key=lambda own: scores[own]) for scores in found]
    return labels, api.Usage(prompt_tokens=tokens, completion_tokens=0, total_tokens=tokens)


def _wants_usage(body: api.Sampled) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _whole(response: BaseModel) -> Response:
    return JSONResponse(response.model_dump())


def _streamed(pieces: Sequence[BaseModel]) -> Response:
    events = []
    for piece in pieces:
        content = piece.model_dump(exclude_none=True)
        for choice in content["choices"]:
            choice.setdefault("finish_reason", None)
        events.append(f"data: {json.dumps(content)}\n\n")
    headers = {"cache-control": "no-store"}
    return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream", headers=headers)
