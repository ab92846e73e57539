"""Fair scheduling: clients take turns, and so do the HTTP requests of one client."""

import asyncio
import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Sender:
    """The origin of a piece of work.

    Attributes:
      client: identifies the client; clients take turns.
      request: the number of the HTTP request; a client's requests take turns, one answer at a time.
    """

    client: str
    request: int


def sender_of(scope: Mapping[str, Any]) -> Sender:
    """Returns the sender of an HTTP request.

    A client is identified by its address and Authorization header, not by the connection. Uvicorn reads the address
    from X-Forwarded-For if a proxy on a trusted address has set it.
    """
    address = (scope.get("client") or ("",))[0]
    keys = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
    return Sender(" ".join([address, *keys]), next(_numbers))


def has_share(taken: Mapping[str, int], client: str, count: int, limit: int) -> bool:
    """Whether a client may add `count` pieces of work to those that wait or run.

    The limit applies to all clients together. A client with less than an equal share may exceed it, so that a client
    that has used up the limit does not shut out the others. The total never exceeds twice the limit.

    Args:
      taken: the number of pieces that each client has.
      client: the client that adds work.
      count: the number of pieces to add.
      limit: the most pieces of all clients together.
    """
    total = sum(taken.values()) + count
    if total <= limit:
        return True
    clients = {name for name, pieces in taken.items() if pieces} | {client}
    return total <= 2 * limit and taken.get(client, 0) + count <= limit // len(clients)


class Turns(Generic[T]):
    """A queue in which clients take turns, each client's requests take turns, and a request's items stay in order.

    All methods are thread-safe.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, collections.deque[T]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(items) for requests in self._waiting.values() for items in requests.values())

    def add(self, sender: Sender, item: T) -> None:
        """Adds an item after the others of its request."""
        with self._lock:
            self._waiting.setdefault(sender.client, {}).setdefault(sender.request, collections.deque()).append(item)

    def remove(self, sender: Sender, item: T) -> None:
        """Removes an item, if it still waits."""
        with self._lock:
            requests = self._waiting.get(sender.client, {})
            items = requests.get(sender.request, collections.deque())
            if item in items:
                items.remove(item)
                if not items:
                    del requests[sender.request]
                if not requests:
                    del self._waiting[sender.client]

    def take(self, may: Callable[[Sender, T], bool] = lambda *_: True) -> T | None:
        """Removes and returns the next item for which `may` is true of its sender and itself; None if there is none."""
        with self._lock:
            for client, requests in self._waiting.items():
                for request, items in requests.items():
                    sender = Sender(client, request)
                    if may(sender, items[0]):
                        item = items.popleft()
                        self._move_back(sender)
                        return item
        return None

    def _move_back(self, sender: Sender) -> None:
        """Moves the client after all others, and the request after the client's other requests; drops empty queues."""
        requests = self._waiting.pop(sender.client)
        items = requests.pop(sender.request)
        if items:
            requests[sender.request] = items
        if requests:
            self._waiting[sender.client] = requests


class Lane:
    """A thread that runs one piece of work at a time; senders take turns. Any thread may submit work."""

    def __init__(self, name: str):
        """Creates the thread with this name."""
        self._thread = ThreadPoolExecutor(1, name)
        self._turns: Turns[tuple[Future[Any], Callable[[], Any]]] = Turns()

    async def run(self, sender: Sender, work: Callable[[], T]) -> T:
        """Runs a piece of work in its turn and returns its result. Work that is cancelled before that never runs."""
        future: Future[T] = Future()
        self._turns.add(sender, (future, work))
        self._thread.submit(self._next)
        return await asyncio.wrap_future(future)

    def _next(self) -> None:
        found = self._turns.take()
        assert found is not None  # one is added before each call
        future, work = found
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
