"""Makes SIGINT and SIGTERM end this package's programs at any moment, with one line on stderr and code 130 or 143.

Python runs a signal handler between two instructions of the main thread, which may be busy compiling for minutes. So a
thread also reads signal numbers from a pipe, which the C-level handler of Python writes to at once.

`spt_jax/__init__.py` imports this module before all others, because importing those takes seconds.
"""

import atexit
import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spt_jax.runtime.huge_pages import use_huge_pages

PROGRAM = "spt-jax"  # the console script
NUMBERS = (signal.SIGINT, signal.SIGTERM)

_FLUSH_SECONDS = 0.2  # time for the main thread to flush its output
_ending = threading.RLock()  # reentrant: a second signal may arrive in the thread that is already ending the process
_installed = False
_advice: list[str] = []
_before_end: list[Callable[[int], Any]] = []
_holding: Any = None  # handler of the innermost `held`
_seen: list[int] = []  # signals since that `held` was entered


@functools.cache  # With -m, only what is imported first can tell.
def is_program() -> bool:
    """Says what this process is.

    Returns:
      Whether it is `spt-jax`, `python -m spt_jax` or the train.py next to this package.
    """
    if sys.argv[:1] == ["-m"]:  # Python is still locating the module.
        arguments = sys.orig_argv
        return "-mspt_jax" in arguments or ("-m", "spt_jax") in itertools.pairwise(arguments)
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None:
        return False
    return Path(file).name == PROGRAM or Path(file).resolve() == Path(__file__).resolve().parents[2] / "train.py"


def install() -> None:
    """From now on, the first signal ends this process with one line. Must be called in the main thread."""
    global _installed
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, _end_in_main)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    os.register_at_fork(after_in_child=_uninstall)
    atexit.register(_ignore)  # Python removes its handlers some tenths of a second before it exits.
    _installed = True


def reclaim() -> None:
    """Takes SIGTERM back from JAX, whose handler for jobs of several processes only records it."""
    if _installed and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _uninstall() -> None:
    """Restores the default handlers in a forked child, which must not write to the pipe of its parent."""
    global _installed
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _installed = False


def _ignore() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def advising(how: str) -> Iterator[None]:
    """Adds advice on how to continue to the line that is printed if a signal ends the process inside.

    Args:
      how: the advice.
    """
    _advice.append(how)
    try:
        yield
    finally:
        _advice.remove(how)


@contextlib.contextmanager
def telling(others: Callable[[int], Any]) -> Iterator[None]:
    """Calls `others` with the signal number if a signal is about to end the process inside.

    Args:
      others: what to call, with the signal's number.
    """
    _before_end.append(others)
    try:
        yield
    finally:
        _before_end.remove(others)


@contextlib.contextmanager
def held(numbers: Sequence[int] = NUMBERS, then: Callable[[], Any] = lambda: None) -> Iterator[list[int]]:
    """Records signals instead of ending the process. SIGINT after another signal ends it at once.

    Args:
      numbers: signals to record.
      then: called after each of them.

    Yields:
      The list of signal numbers received so far.
    """
    global _holding
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            if _installed:
                _end_in_main(number, frame)
            raise KeyboardInterrupt
        caught.append(number)
        then()

    _seen.clear()
    outer, _holding = _holding, note
    try:
        previous = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread, which alone receives signals
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _holding = outer


def _end_in_main(number: int, frame: Any) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    _end(number)


def _watch(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 16):
            handler = signal.getsignal(number)
            if handler is _holding:
                _seen.append(number)
            if handler is _end_in_main or (handler is _holding and number == signal.SIGINT and len(_seen) > 1):
                time.sleep(_FLUSH_SECONDS)
                _end(number)


def _end(number: int) -> NoReturn:
    if not _ending.acquire(blocking=False):
        while True:  # until the other thread ends the process
            time.sleep(1)
    for tell in _before_end:
        with contextlib.suppress(Exception):
            tell(number)
    line = ". ".join([f"stopped by {signal.Signals(number).name}", *_advice[-1:]])
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


if is_program():
    use_huge_pages()
    install()
