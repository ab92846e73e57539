"""Counts the programs that are being compiled, so that a client can be told why an answer takes long."""

import contextlib
import threading
from collections.abc import Iterator


class Compilations:
    """How many compilations run or wait for their turn. All methods are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts a compilation while the context lasts."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    def _add(self, change: int) -> None:
        with self._lock:
            self._count += change
