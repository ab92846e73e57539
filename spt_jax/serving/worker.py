"""The thread that runs an engine, and tells those who asked what their requests have got."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from spt_jax.errors import ConfigError, SptError
from spt_jax.inference.generation import Generated
from spt_jax.serving.engine import NOBODY, Engine, Request, Ticket
from spt_jax.serving.fairness import has_share

logger = logging.getLogger(__name__)


class QueueFullError(SptError):
    """As many requests wait as may."""


class EngineFailedError(SptError):
    """The engine has stopped, and answers nothing any more."""


@dataclasses.dataclass(frozen=True)
class Update:
    """What a request has got since it was last told.

    result: the whole answer, at its end.
    error: why there will be none.
    """

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    alternatives: tuple[dict[int, float], ...] = ()
    result: Generated | None = None
    error: SptError | None = None


Listener = Callable[[Update], None]


class Worker:
    """Steps an engine in a thread of its own. Everything here may be called from any thread.

    Attributes:
      failure: why it has stopped, if it has.
      queue: how many requests may wait for a slot, of all clients together; see `fairness.has_share`.
      compiling: a thread for `prepare`, which many requests may wait for without taking up others' threads.
    """

    def __init__(self, engine: Engine, *, queue: int = 256):
        """queue: requests that may wait for a slot."""
        self.engine = engine
        self.failure: EngineFailedError | None = None
        self.queue = queue
        self._listeners: dict[Ticket, tuple[Listener, int]] = {}
        self._cancelled: list[Ticket] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.compiling = ThreadPoolExecutor(1, "compiling")

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Waits for the step under way; requests without an answer are told that there will be none."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def check_room(self, count: int, client: str = NOBODY.client) -> None:
        """Whether so many requests more of a client can be taken now.

        Raises:
          QueueFullError, EngineFailedError: not now; not any more.
          ConfigError: never so many at once.
        """
        most = self.queue + self.engine.slots
        if self.failure is not None:
            raise self.failure
        if count > most:
            raise ConfigError(f"this asks for {count} answers at once; the server takes at most {most}")
        with self._changed:
            taken = collections.Counter(ticket.sender.client for ticket in self._listeners)
        if not has_share(taken, client, count, most):
            raise QueueFullError(f"{self.engine.waiting} requests wait already")

    def is_prepared(self, request: Request) -> bool:
        """Whether what a request needs is compiled; so it counts if the engine would refuse it."""
        held = request.held or self.engine.bank.held(request.prompt)
        unfit = not held.generates or len(request.ids) > self.engine.context
        return unfit or self.engine.is_warm(held, len(request.ids))

    def prepare(self, request: Request) -> None:
        """Compiles what a request needs."""
        if not self.is_prepared(request):
            self.engine.warm(request.held or self.engine.bank.held(request.prompt), len(request.ids))

    def submit(self, requests: Sequence[tuple[Request, Listener]]) -> list[Ticket]:
        """Takes requests in, all or none. Listeners are called in the engine's thread, and must not wait.

        What they need is compiled here, if `prepare` has not, so that others need not wait for it.

        Raises:
          QueueFullError, EngineFailedError, ConfigError, DataError: as `check_room` and `Engine.submit`.
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
        """Ends a request without an answer, before the next step; one that has its answer stays as it is."""
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
        """Until there is something to do; False if nothing more is to be done."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._cancelled or not self.engine.idle)
            for ticket in self._cancelled:
                self.engine.cancel(ticket)
            self._cancelled = []
            return not self._stopping

    def _tell(self) -> None:
        with self._changed:
            told = list(self._listeners.items())
        for ticket, (listener, seen) in told:
            if len(ticket.ids) == seen and not ticket.done:
                continue
            ids, log_probabilities = tuple(ticket.ids[seen:]), tuple(ticket.log_probabilities[seen:])
            update = Update(ids, log_probabilities, tuple(ticket.alternatives[seen:]), ticket.result, ticket.error)
            heard = self._notify(listener, update)
            with self._changed:
                if ticket.done:
                    self._listeners.pop(ticket, None)
                elif not heard:
                    self._forget(ticket)
                elif ticket in self._listeners:
                    self._listeners[ticket] = listener, len(ticket.ids)

    @staticmethod
    def _notify(listener: Listener, update: Update) -> bool:
        """Whether a listener could be told: one that fails ends its own request alone."""
        try:
            listener(update)
        except Exception:
            logger.exception("a request's listener has failed")
            return False
        return True
