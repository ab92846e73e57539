"""Messages about waits, such as loading and compilation, on stderr."""

import contextlib
import threading
import time
from collections.abc import Iterator

from spt_jax.runtime import processes
from spt_jax.runtime.progress import say

PATIENCE = 1.0  # seconds before a wait that is usually short is mentioned


@contextlib.contextmanager
def spoken(what: str, *, after: float = PATIENCE, shown: bool = True) -> Iterator[None]:
    """Context manager that says what a process is waiting for, and at the end how long it took.

    Nothing is said if the wait ends within `after` seconds, and only the first process of a run says anything.

    Args:
      what: what is done, such as "loading starter".
      after: the seconds before the first message.
      shown: whether to say anything.
    """
    if not (shown and processes.leads()):
        yield
        return
    started, said = time.perf_counter(), threading.Event()

    def begin() -> None:
        said.set()
        say(f"{what} ...")

    timer = threading.Timer(after, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        say(f"{what}: {time.perf_counter() - started:.1f} s")
