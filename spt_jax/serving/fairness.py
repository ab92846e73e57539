"""Whose turn it is: clients take turns, and so do the HTTP requests of one client."""

import asyncio
import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from starlette.types import Scope

T = TypeVar("T")
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Sender:
    """Where work comes from.

    Attributes:
      client: who sent it; clients take turns.
      request: the number of the HTTP request; the requests of a client take turns, each with one answer at a time.
    """

    client: str
    request: int


def sender_of(scope: Scope) -> Sender:
    """The sender of an HTTP request.

    A client is an address with an Authorization header, whatever the connection. Uvicorn reads the address from
    X-Forwarded-For where a proxy on a trusted address has set it.
    """
    address = (scope.get("client") or ("",))[0]
    keys = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
    return Sender(" ".join([address, *keys]), next(_numbers))


def has_share(taken: Mapping[str, int], client: str, count: int, limit: int) -> bool:
    """Whether a client may add `count` pieces of work to those that wait or are under way.

    The limit is for all clients together. A client with less than an equal share of it may go beyond, so that another
    that has used it up shuts nobody out; never beyond twice the limit.

    Args:
      taken: how many pieces each client has.
      client: who asks.
      count: pieces to add.
      limit: of all pieces.
    """
    total = sum(taken.values()) + count
    if total <= limit:
        return True
    clients = {name for name, own in taken.items() if own} | {client}
    return total <= 2 * limit and taken.get(client, 0) + count <= limit // len(clients)


class Turns(Generic[T]):
    """Items that wait. Clients take turns, their requests take turns, and items of one request stay in order.

    Any thread may use it.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, dict[int, collections.deque[T]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(items) for requests in self._waiting.values() for items in requests.values())

    def add(self, sender: Sender, item: T) -> None:
        """Adds an item behind the others of its request."""
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

    def take(self, may: Callable[[Sender], bool] = lambda _: True) -> T | None:
        """Removes and returns the item whose turn it is, of senders that may; None if there is none."""
        with self._lock:
            for client, requests in self._waiting.items():
                for request, items in requests.items():
                    sender = Sender(client, request)
                    if may(sender):
                        item = items.popleft()
                        self._move_back(sender)
                        return item
        return None

    def _move_back(self, sender: Sender) -> None:
        """Puts a client after the other clients, and a request after the client's others; drops what is empty."""
        requests = self._waiting.pop(sender.client)
        items = requests.pop(sender.request)
        if items:
            requests[sender.request] = items
        if requests:
            self._waiting[sender.client] = requests


class Lane:
    """A thread that does one piece of work after another, senders in turn. Any thread may submit."""

    def __init__(self, name: str):
        """name: of the thread."""
        self._thread = ThreadPoolExecutor(1, name)
        self._turns: Turns[tuple[Future[Any], Callable[[], Any]]] = Turns()

    async def run(self, sender: Sender, work: Callable[[], T]) -> T:
        """Does a piece of work in its turn, and returns its result. Work that is cancelled before does not begin."""
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
