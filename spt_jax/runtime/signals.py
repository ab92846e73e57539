"""SIGINT and SIGTERM in this package's programs: one line on stderr and the exit code 130 or 143, at any moment.

Python runs a signal handler between two instructions of the main thread, which may wait for minutes in a compilation.
So a thread also reads the numbers of the signals from a pipe, to which Python's handler in C writes them at once.

`spt_jax/__init__.py` imports this module before all others, because importing them takes seconds.
"""

import atexit
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)

_FLUSH_SECONDS = 0.2  # for the main thread to write out what it has printed
_ending = threading.RLock()  # A second signal may interrupt the end in the same thread: it goes on to the exit.
_installed = False
_advice: list[str] = []
_before_end: list[Callable[[int], Any]] = []
_holding: Any = None  # the handler of the innermost `held`
_seen: list[int] = []  # signals since it was entered


def is_program() -> bool:
    """Whether this process is `python -m spt_jax` or runs the train.py beside this package."""
    if sys.argv[:1] == ["-m"]:  # the module is still being looked up
        words = sys.orig_argv
        return "-mspt_jax" in words or ("-m", "spt_jax") in itertools.pairwise(words)
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and Path(file).resolve() == Path(__file__).resolve().parents[2] / "train.py"


def install() -> None:
    """Ends this process in one line at the first signal from here on. Must be called in the main thread."""
    global _installed
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, _end_in_main)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    os.register_at_fork(after_in_child=_uninstall)
    atexit.register(_ignore)  # Python takes its handlers down before its last tenths of a second.
    _installed = True


def _uninstall() -> None:
    """A forked child must not write into the pipe of its parent."""
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
    """Adds how to go on to the line of a signal that ends the process inside."""
    _advice.append(how)
    try:
        yield
    finally:
        _advice.remove(how)


@contextlib.contextmanager
def telling(others: Callable[[int], Any]) -> Iterator[None]:
    """Calls `others` with the number of a signal that ends the process inside, before the end."""
    _before_end.append(others)
    try:
        yield
    finally:
        _before_end.remove(others)


@contextlib.contextmanager
def held(numbers: Sequence[int] = NUMBERS, then: Callable[[], Any] = lambda: None) -> Iterator[list[int]]:
    """Notes signals instead of ending the process. SIGINT after another signal ends it at once.

    Args:
      numbers: which signals.
      then: called after each.

    Yields:
      The numbers of the signals so far.
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
    except ValueError:  # not the main thread, the only one that gets signals
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
        while True:  # until the other thread has ended the process
            time.sleep(1)
    for tell in _before_end:
        with contextlib.suppress(Exception):
            tell(number)
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    line = "\n" if len(getattr(bar, "_instances", ())) else ""
    line += ". ".join([f"stopped by {signal.Signals(number).name}", *_advice[-1:]])
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


if is_program():
    install()
