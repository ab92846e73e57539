"""The progress of long tasks on stderr: bars on a terminal; elsewhere, as in log files, lines.

Lines follow each other within `line_seconds`: 5 seconds in the first minute, and later less often, so that the log of a
long run stays readable. A line then says when the next one comes.

Output to a terminal is drawn by rich, which is imported only there. Messages about what is going on are written with
`say`, so that they appear above the bars.
"""

import contextlib
import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from spt_jax.runtime import processes, signals

if TYPE_CHECKING:
    import rich.progress

_POLL_SECONDS = 1.0
_FRAMES_PER_SECOND = 4


def line_seconds(elapsed: float) -> float:
    """Returns the longest time without a line where there is no terminal, in seconds.

    Args:
      elapsed: the seconds since the start of the outermost task.
    """
    return 5.0 if elapsed < 60 else 10.0 if elapsed < 600 else 60.0


def say(line: str) -> None:
    """Writes a line to stderr, above the bars if there are any."""
    bars = _display.bars  # Another thread may close them.
    if bars is None:
        print(line, file=sys.stderr, flush=True)
        _lines.said = time.monotonic()
    else:
        bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Returns a duration in words, such as 45 s, 12:05 min or 3:20 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class Progress:
    """The progress of a task. A context manager, closed at its end."""

    def __init__(self, what: str, total: int | None, done: int = 0, *, unit: str = "", shown: bool = True):
        """Shows the task, in the first process of a run.

        Args:
          what: what is done, such as "training".
          total: the number of parts; None for a task without parts.
          done: the number of parts that were done before.
          unit: the name of a part, in lines.
          shown: whether to show anything.
        """
        self.done = done
        self._what, self._total, self._first, self._unit = what, total, done, unit
        self._note = self._name = ""
        self.started = time.monotonic()
        self._warm: tuple[float, int] | None = None  # when the first parts were done, and how many
        self.shown = shown and processes.leads()
        self._closed = threading.Event()
        self._bar: rich.progress.TaskID | None = None
        if not self.shown:
            return
        if _on_terminal():
            self._bar = _display.add(what, total, done)
        else:
            _lines.add(self)
            threading.Thread(target=self._say_often, daemon=True).start()

    def begin(self, name: str) -> None:
        """Names the part that begins."""
        self._name = name
        self._update()

    def advance(self, parts: int = 1, note: str = "") -> None:
        """Counts parts that are done.

        Args:
          parts: their number.
          note: what is known after them, such as a loss.
        """
        self.done += parts
        self._warm = self._warm or (time.monotonic(), self.done)
        self._note = note
        self._update()

    @property
    def remaining(self) -> float | None:
        """The estimated seconds until the end; None before the first part is done, and for a task without parts.

        The first parts, which may include compilation, count only as long as there are no others.
        """
        if self._warm is None or self._total is None:
            return None
        since, done = self._warm if self.done > self._warm[1] else (self.started, self._first)
        return (time.monotonic() - since) / (self.done - done) * (self._total - self.done)

    def line(self) -> str:
        """Returns the progress as a line."""
        spent = f"after {duration(time.monotonic() - self.started)}"
        if self._total is None:
            return f"{self._what}, {spent}"
        name = f"{self._name}, " if self._name else ""
        number = min(self.done + bool(self._name), self._total)
        left = f"{duration(self.remaining)} left" if self.remaining is not None else spent
        unit = f"{self._unit} " if self._unit else ""
        parts = f"{self._what}: {name}{unit}{number} of {self._total}"
        return ", ".join(filter(None, [parts, self._note, left]))

    def close(self) -> None:
        """Removes the bar, or ends the lines."""
        self._closed.set()
        if self in _lines.open:
            _lines.open.remove(self)
        if self._bar is not None:
            _display.remove(self._bar)
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _update(self) -> None:
        if self._bar is not None:
            what = f"{self._what}: {self._name}" if self._name else self._what
            left = "" if self.remaining is None else f"{duration(self.remaining)} left"
            _display.update(self._bar, what, self.done, self._note, left)
        elif self.shown:
            _lines.say()

    def _say_often(self) -> None:
        while not self._closed.wait(min(_POLL_SECONDS, _lines.due or _POLL_SECONDS)):
            _lines.say()


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Lines:
    """The open tasks of the process where there is no terminal, which share their lines; the last one is innermost."""

    def __init__(self) -> None:
        self.open: list[Progress] = []
        self.said = float("-inf")  # when the last line was written
        self._every = line_seconds(0.0)
        self._lock = threading.Lock()

    @property
    def due(self) -> float:
        """The seconds until the next line; 0 if it is due."""
        return max(0.0, self.said + self._every - time.monotonic())

    def add(self, task: Progress) -> None:
        """Adds a task, as the innermost one."""
        if not self.open:
            self._every = line_seconds(0.0)
        self.open.append(task)

    def say(self) -> None:
        """Says how far all tasks are, if a line is due."""
        with self._lock:
            tasks = list(self.open)  # Another thread may remove some.
            if tasks and not self.due:
                parts = [task.line() for task in tasks]
                self._every = line_seconds(time.monotonic() - tasks[0].started)
                seldom = self._every > line_seconds(0.0)
                say("; ".join([*parts, f"next line in {duration(self._every)}"] if seldom else parts))


class _Display:
    """All bars of the process, which rich draws together. Waits add bars in threads of their own."""

    def __init__(self) -> None:
        self.bars: rich.progress.Progress | None = None
        self._open = contextlib.ExitStack()
        self._lock = threading.Lock()

    def add(self, what: str, total: int | None, done: int) -> "rich.progress.TaskID":
        with self._lock:
            if self.bars is None:
                self.bars = self._open.enter_context(_new_bars())
                self._open.enter_context(signals.telling(lambda _: os.write(2, b"\n")))
            return self.bars.add_task(what, total=total, completed=done, note="", left="")

    def update(self, bar: "rich.progress.TaskID", what: str, done: int, note: str, left: str) -> None:
        assert self.bars is not None
        self.bars.update(bar, description=what, completed=done, note=note, left=left)

    def remove(self, bar: "rich.progress.TaskID") -> None:
        with self._lock:
            assert self.bars is not None
            self.bars.remove_task(bar)
            if not self.bars.tasks:
                self._open.close()
                self.bars = None


def _new_bars() -> "rich.progress.Progress":
    import rich.progress
    from rich.console import Console

    class Visible(Console):
        """Leaves the cursor visible, which a killed process could not bring back."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=16),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[left]}", markup=False),
        console=Visible(stderr=True),
        transient=True,
        refresh_per_second=_FRAMES_PER_SECOND,
        redirect_stdout=sys.stdout.isatty(),
    )


_lines, _display = _Lines(), _Display()
