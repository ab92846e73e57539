"""Processes of a stage: started with a time limit, recorded on disk while they run, and killed with their parent.

Nothing here imports JAX or torch, so a parent never takes memory of the accelerator.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

ROOT = Path(__file__).resolve().parents[2]
TAIL = 2000  # characters of a failed process's output that a report quotes
_POLL_SECONDS, _ORPHAN_SECONDS = 0.5, 30.0


class Skip(Exception):  # noqa: N818 (not an error: there is nothing to measure here)
    """A stage or a part of it cannot run here; the message names what it needs."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The task of a process.

    Attributes:
      result: the JSON file that it writes.
      deadline: when it will be killed, in seconds of `time.time()`.
      tiny: whether to run tiny shapes.
      options: further options of its module.
    """

    result: Path
    deadline: float
    tiny: bool
    options: Mapping[str, Any]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()


class Record:
    """A JSON object in a file, which is rewritten atomically after each change. Threads may share it."""

    def __init__(self, path: Path, **content: Any) -> None:
        self._path, self._lock = path, threading.Lock()
        self.content: dict[str, Any] = content
        self.update()

    def update(self, **fields: Any) -> None:
        """Sets fields of the object."""
        with self._lock:
            self.content |= _strict(fields)
            common.write_json(self._path, self.content)

    def put(self, section: str, name: str, value: Any) -> None:
        """Sets one entry of a field that is itself an object."""
        with self._lock:
            self.content.setdefault(section, {})[name] = _strict(value)
            common.write_json(self._path, self.content)


def _strict(value: Any) -> Any:
    """Returns the value with None in place of numbers that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path) -> dict[str, Any]:
    """Returns what a process has recorded; empty if it has recorded nothing yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def run_process(
    module: str,
    result: Path,
    *,
    seconds: float,
    grace: float = 0.0,
    tiny: bool,
    log: Path,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    own_group: bool = False,
) -> dict[str, Any]:
    """Runs a module's `run` in a separate process, and returns what it recorded.

    Args:
      module: dotted name of a module with `run(task, record)`.
      result: the JSON file of the process; its final content is also returned.
      seconds: until the deadline of the process.
      grace: seconds after the deadline at which it is killed.
      tiny: for `Task`.
      log: file that the output is appended to.
      options: for `Task`.
      environment: variables to set in addition to those of this process.
      own_group: whether the process leads a separate process group, which is killed with it.

    Returns:
      The record with `seconds` and a `status`: "passed", "skipped", "failed", "out of memory", "out of time" (killed at
      the limit) or "crashed" (ended without a result), with `error` for the last four.
    """
    result.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.accelerator_stages", module, "--result", str(result)]
    words += ["--deadline", str(time.time() + seconds), "--options", json.dumps(dict(options or {}))]
    words += ["--tiny"] * tiny
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "ab") as output:
        start = output.tell()
        child = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": _search_path(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
        code = _wait(child, seconds + grace, own_group)
    found = read_record(result)
    result.with_name(result.name + ".tmp").unlink(missing_ok=True)
    found["seconds"] = round(time.perf_counter() - started, 2)
    if code is None:
        found |= {
            "status": "out of time",
            "error": f"killed after {seconds + grace:.0f} s; its last output: {_tail(log, start)}",
        }
    elif found.get("status", "running") == "running":
        found |= {"status": "crashed", "error": f"exit code {code}; its last output: {_tail(log, start)}"}
    common.write_json(result, found)
    return found


def _search_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _wait(child: subprocess.Popen, seconds: float, own_group: bool) -> int | None:
    """Returns the exit code, or None if the process ran out of time. The process never outlives this call."""
    try:
        return child.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if own_group:
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
            child.wait()


def _tail(log: Path, start: int) -> str:
    with open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - TAIL))
        return file.read().decode(errors="replace").strip()


def end_with_parent(deadline: float) -> None:
    """Kills this process as soon as its parent is gone, so that no process is left on the device.

    In case the parent was gone before this was called, the process is also killed some time after the deadline.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and time.time() < deadline + _ORPHAN_SECONDS:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that child processes are ended."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def require(*packages: str) -> None:
    """Raises Skip with the names of the packages that are not installed, if there are any."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"needs {' and '.join(missing)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of JAX, torch or Python reports that memory ran out."""
    text = f"{type(error).__name__}: {error}"
    signs = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory", "Out of memory", "MemoryError")
    return any(sign in text for sign in signs)


def failures(rows: Mapping[str, Mapping[str, Any]], accepted: Sequence[str] = ("passed", "skipped")) -> list[str]:
    """Returns the names of the rows whose status is not accepted."""
    return [name for name, row in rows.items() if row["status"] not in accepted]
