"""What the server counts, as Prometheus reads it."""

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spt_jax.serving.protocol import Usage
from spt_jax.serving.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class CountedResponses:
    """ASGI middleware that counts responses by their status."""

    def __init__(self, app: ASGIApp, *, counter: Counter):
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._counter.labels(message["status"]).inc()
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not started:  # it is answered further out
                self._counter.labels(500).inc()
            raise


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, worker: Worker):
        self._registry = own = CollectorRegistry()
        self.first_token = Histogram(
            "spt_jax_first_token_seconds",
            "From a request's tokens to its first new one.",
            registry=own,
            buckets=_SECONDS,
        )
        self._seconds = Histogram("spt_jax_answer_seconds", "Until an answer's end.", registry=own, buckets=_SECONDS)
        self._new = Counter("spt_jax_generated_tokens", "Tokens of finished answers.", registry=own)
        self._read = Counter("spt_jax_prompt_tokens", "Tokens of answered requests, virtual ones too.", registry=own)
        self._answers = Counter("spt_jax_answers", "Finished answers.", registry=own)
        self._classified = Counter("spt_jax_classified", "Classified texts.", registry=own)
        self.responses = Counter("spt_jax_responses", "By HTTP status, refusals too.", ["status"], registry=own)
        self._classify_seconds = Histogram(
            "spt_jax_classify_seconds", "Of a request to classify.", registry=own, buckets=_SECONDS
        )
        engine = worker.engine
        for name, words, read in (
            ("waiting", "Requests without a slot.", lambda: engine.waiting),
            ("under_way", "Requests in a slot.", lambda: engine.under_way),
            ("prompts", "Prompts in the bank.", lambda: len(engine.bank.names)),
            ("prompt_device_bytes", "Of prompts on the device.", lambda: engine.bank.device_bytes),
        ):
            Gauge(f"spt_jax_{name}", words, registry=own).set_function(read)

    def answered(self, choices: int, usage: Usage, seconds: float) -> None:
        """Counts the choices of an answer and its tokens."""
        self._answers.inc(choices)
        self._new.inc(usage.completion_tokens)
        self._read.inc(usage.prompt_tokens)
        self._seconds.observe(seconds)

    @contextlib.contextmanager
    def classifying(self, texts: int) -> Iterator[None]:
        """Counts and times texts that are classified meanwhile."""
        began = time.perf_counter()
        yield
        self._classified.inc(texts)
        self._classify_seconds.observe(time.perf_counter() - began)

    def text(self) -> str:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry).decode()
