"""The thread that runs an engine, and tells those who asked what their requests have got."""

import dataclasses
import threading
from collections.abc import Callable

from spt_jax.errors import SptError
from spt_jax.generation import Generated
from spt_jax.serving.engine import Engine, Request, Ticket


class QueueFullError(SptError):
    """As many requests wait as may."""


class EngineFailedError(SptError):
    """The engine has stopped on an error, and answers nothing any more."""


@dataclasses.dataclass(frozen=True)
class News:
    """What a request has got since it was last told.

    result: the whole answer, at its end.
    error: why there will be none.
    """

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    result: Generated | None = None
    error: Exception | None = None


class Worker:
    """Steps an engine in a thread of its own. Everything here may be called from any thread."""

    def __init__(self, engine: Engine, *, queue: int = 256):
        """queue: requests that may wait for a slot."""
        self.engine = engine
        self.failure: Exception | None = None
        self._queue = queue
        self._listeners: dict[Ticket, tuple[Callable[[News], None], int]] = {}
        self._cancelled: list[Ticket] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Waits for the step under way; requests without an answer get none."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: Request, listener: Callable[[News], None]) -> Ticket:
        """Takes a request in. `listener` is called in the engine's thread, and must not wait.

        What the request needs is compiled here, so that others need not wait for it.

        Raises:
          QueueFullError, EngineFailedError: it cannot be taken.
          ConfigError, DataError: as `Engine.submit`.
        """
        held = self.engine.bank.held(request.prompt)
        if held.generates:
            self.engine.warm(held, len(request.ids))
        with self._changed:
            if self.failure is not None:
                raise EngineFailedError(f"the engine has failed: {self.failure}")
            if self.engine.waiting >= self._queue:
                raise QueueFullError(f"{self._queue} requests wait already")
            ticket = self.engine.submit(request)
            self._listeners[ticket] = listener, 0
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request without an answer, before the next step; one that has its answer stays as it is."""
        with self._changed:
            if self._listeners.pop(ticket, None) is not None:
                self._cancelled.append(ticket)
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._cancelled or not self.engine.idle)
                if self._stopping:
                    return
                cancelled, self._cancelled = self._cancelled, []
            for ticket in cancelled:
                self.engine.cancel(ticket)
            try:
                self.engine.step()
            except Exception as error:
                self._fail(error)
                return
            self._tell()

    def _tell(self) -> None:
        with self._changed:
            told = list(self._listeners.items())
        for ticket, (listener, seen) in told:
            if len(ticket.ids) == seen and not ticket.done:
                continue
            listener(News(tuple(ticket.ids[seen:]), tuple(ticket.log_probabilities[seen:]), ticket.result))
            with self._changed:
                if ticket.done:
                    self._listeners.pop(ticket, None)
                elif ticket in self._listeners:
                    self._listeners[ticket] = listener, len(ticket.ids)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self.failure = error
            listeners, self._listeners = [listener for listener, _ in self._listeners.values()], {}
        for listener in listeners:
            listener(News(error=error))
