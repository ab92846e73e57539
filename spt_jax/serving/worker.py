"""The thread that runs an engine and notifies listeners of their requests' progress."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from spt_jax.errors import ConfigError, SptError
from spt_jax.inference.answers import Generated
from spt_jax.serving.compilations import Compilations
from spt_jax.serving.engine import Engine
from spt_jax.serving.fairness import has_share
from spt_jax.serving.requests import NOBODY, Request, Ticket

logger = logging.getLogger(__name__)


class QueueFullError(SptError):
    """Too many requests are waiting."""


class EngineFailedError(SptError):
    """The engine has stopped and answers no more requests."""


@dataclasses.dataclass(frozen=True)
class Update:
    """The progress of a request since the last update.

    Attributes:
      ids: the new token ids.
      log_probabilities: one per new id.
      alternatives: per new id, the log-probabilities of the likeliest ids.
      result: the complete answer, in the last update.
      error: the error, if there will be no answer.
    """

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    alternatives: tuple[dict[int, float], ...] = ()
    result: Generated | None = None
    error: SptError | None = None


Listener = Callable[[Update], None]


class Worker:
    """Steps an engine in a separate thread. All methods are thread-safe.

    Attributes:
      engine: the engine.
      failure: the reason, if the engine has stopped.
      queue: how many requests of all clients together may wait for a slot; see `fairness.has_share`.
      compiling: a thread for `prepare`, so that requests that wait for a compilation do not occupy other threads.
      compilations: counts the programs that are being compiled.
    """

    def __init__(self, engine: Engine, *, queue: int = 256):
        """Creates a worker that is not yet started.

        Args:
          engine: the engine.
          queue: how many requests may wait for a slot.
        """
        self.engine = engine
        self.failure: EngineFailedError | None = None
        self.queue = queue
        self._listeners: dict[Ticket, tuple[Listener, int]] = {}
        self._cancelled: list[Ticket] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.compiling = ThreadPoolExecutor(1, "compiling")
        self.compilations = Compilations()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread after the current step; unfinished requests get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def check_room(self, count: int, client: str = NOBODY.client) -> None:
        """Checks that a client may add `count` requests now.

        Raises:
          QueueFullError: too many requests are waiting.
          EngineFailedError: the engine has stopped.
          ConfigError: `count` is more than the server ever takes at once.
        """
        most = self.queue + self.engine.slots
        if self.failure is not None:
            raise self.failure
        if count > most:
            raise ConfigError(f"the request needs {count} answers at once, but the server allows at most {most}")
        with self._changed:
            taken = collections.Counter(ticket.sender.client for ticket in self._listeners)
        if not has_share(taken, client, count, most):
            raise QueueFullError(f"{self.engine.waiting} requests are already waiting")

    def is_prepared(self, request: Request) -> bool:
        """Whether the programs that a request needs are compiled; also true if the engine would refuse it."""
        held = request.held or self.engine.bank.held(request.prompt)
        unfit = not held.generates or self.engine.room(held, len(request.ids)) < 1
        return unfit or self.engine.is_warm(held, len(request.ids))

    def prepare(self, request: Request) -> None:
        """Compiles the programs that a request needs."""
        if not self.is_prepared(request):
            with self.compilations.running():
                self.engine.warm(request.held or self.engine.bank.held(request.prompt), len(request.ids))

    def submit(self, requests: Sequence[tuple[Request, Listener]]) -> list[Ticket]:
        """Submits either all of the requests or none. Listeners are called in the engine's thread and must not block.

        Programs that `prepare` has not compiled are compiled here, so that the engine's thread does not wait for them.

        Raises:
          QueueFullError, EngineFailedError, ConfigError, DataError: as in `check_room` and `Engine.submit`.
        """
        for request, _ in requests:
            self.prepare(request)
        tickets: list[Ticket] = []
        sender = next((request.sender for request, _ in requests), None) or NOBODY
        with self._changed:
            self.check_room(len(requests), sender.client)
            try:
                for request, listener in requests:
                    tickets.append(self.engine.submit(request))
                    self._listeners[tickets[-1]] = listener, 0
            except SptError:
                for ticket in tickets:
                    self._forget(ticket)
                raise
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request before the next step; has no effect on a finished one."""
        with self._changed:
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        if self._listeners.pop(ticket, None) is not None:
            self._cancelled.append(ticket)
            self._changed.notify()

    def _run(self) -> None:
        error = EngineFailedError("the server is stopping")
        try:
            while self._wait():
                self.engine.step()
                self._tell()
        except Exception:
            logger.exception("the engine has failed")
            error = EngineFailedError("the engine has failed")
        with self._changed:
            self.failure = error
            listeners, self._listeners = [listener for listener, _ in self._listeners.values()], {}
        for listener in listeners:
            self._notify(listener, Update(error=error))

    def _wait(self) -> bool:
        """Waits for work and cancels tickets; returns False if the worker is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._cancelled or not self.engine.idle)
            for ticket in self._cancelled:
                self.engine.cancel(ticket)
            self._cancelled = []
            return not self._stopping

    def _tell(self) -> None:
        with self._changed:
            listeners = list(self._listeners.items())
        for ticket, (listener, seen) in listeners:
            if len(ticket.ids) == seen and not ticket.done:
                continue
            ids, log_probabilities = tuple(ticket.ids[seen:]), tuple(ticket.log_probabilities[seen:])
            update = Update(ids, log_probabilities, tuple(ticket.alternatives[seen:]), ticket.result, ticket.error)
            delivered = self._notify(listener, update)
            with self._changed:
                if ticket.done:
                    self._listeners.pop(ticket, None)
                elif not delivered:
                    self._forget(ticket)
                elif ticket in self._listeners:
                    self._listeners[ticket] = listener, len(ticket.ids)

    @staticmethod
    def _notify(listener: Listener, update: Update) -> bool:
        """Returns whether the listener accepted the update; a listener that raises ends only its own request."""
        try:
            listener(update)
        except Exception:
            logger.exception("a request's listener has failed")
            return False
        return True
