"""The server's metrics, in Prometheus format."""

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
            if not started:  # an outer middleware sends the answer
                self._counter.labels(500).inc()
            raise


class Metrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self, worker: Worker):
        self._registry = own = CollectorRegistry()
        self.first_token = Histogram(
            "spt_jax_first_token_seconds",
            "Seconds from the submission of a request to its first token.",
            registry=own,
            buckets=_SECONDS,
        )
        self._seconds = Histogram(
            "spt_jax_answer_seconds", "Seconds until an answer is complete.", registry=own, buckets=_SECONDS
        )
        self._new = Counter("spt_jax_generated_tokens", "Generated tokens of finished answers.", registry=own)
        self._read = Counter(
            "spt_jax_prompt_tokens", "Prompt tokens of answered requests, virtual tokens included.", registry=own
        )
        self._answers = Counter("spt_jax_answers", "Finished answers.", registry=own)
        self._classified = Counter("spt_jax_classified", "Classified texts.", registry=own)
        self.responses = Counter(
            "spt_jax_responses", "Responses by HTTP status, refusals included.", ["status"], registry=own
        )
        self._classify_seconds = Histogram(
            "spt_jax_classify_seconds", "Seconds of a request to classify.", registry=own, buckets=_SECONDS
        )
        engine = worker.engine
        for name, words, read in (
            ("waiting", "Requests that wait for a slot.", lambda: engine.waiting),
            ("under_way", "Requests that have a slot.", lambda: engine.under_way),
            ("prompts", "Prompts in the bank.", lambda: len(engine.bank.names)),
            ("prompt_device_bytes", "Bytes of the prompts on the device.", lambda: engine.bank.device_bytes),
        ):
            Gauge(f"spt_jax_{name}", words, registry=own).set_function(read)

    def answered(self, choices: int, usage: Usage, seconds: float) -> None:
        """Records the choices, tokens and seconds of an answer."""
        self._answers.inc(choices)
        self._new.inc(usage.completion_tokens)
        self._read.inc(usage.prompt_tokens)
        self._seconds.observe(seconds)

    @contextlib.contextmanager
    def classifying(self, texts: int) -> Iterator[None]:
        """Context manager that counts and times the texts that are classified inside it."""
        began = time.perf_counter()
        yield
        self._classified.inc(texts)
        self._classify_seconds.observe(time.perf_counter() - began)

    def text(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()
