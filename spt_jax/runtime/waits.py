"""Messages about waits, such as loading and compilation, on stderr: at the start, while they last, and at the end."""

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator

from spt_jax.runtime import processes
from spt_jax.runtime.progress import Progress, say

PATIENCE = 1.0  # seconds before a wait that is usually short is mentioned
_silent = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Context manager within which `spoken` says nothing, in this thread."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextlib.contextmanager
def spoken(what: str, *, after: float = PATIENCE, shown: bool = True) -> Iterator[None]:
    """Context manager that says what a process is waiting for, again while it lasts, and at the end how long it took.

    While it lasts, it is shown like other tasks (`Progress`). Nothing is said if the wait ends within `after` seconds,
    and only the first process of a run says anything.

    Args:
      what: what is done, such as "loading starter".
      after: the seconds before the first message.
      shown: whether to say anything.
    """
    if not (shown and processes.leads()) or _silent.get():
        yield
        return
    started, lock = time.perf_counter(), threading.Lock()
    tasks: list[Progress] = []
    ended = False

    def begin() -> None:
        with lock:
            if not ended:
                say(f"{what} ...")
                tasks.append(Progress(what, None))

    timer = threading.Timer(after, begin)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
        for task in tasks:
            task.close()
    if tasks:
        say(f"{what}: {time.perf_counter() - started:.1f} s")
