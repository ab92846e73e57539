"""Times the operations of compiled programs by JAX's profiler, on any device that it can trace."""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.program import Operation, operations


@dataclasses.dataclass(frozen=True)
class Timed:
    """The executions of one operation.

    Attributes:
      program: name of the compiled program.
      name: of the instruction.
      seconds: for all executions. Operations that run at the same time share it, so that the sum is the time in which
        the device was busy.
      times: number of executions.
      operation: what the instruction does; None if its program's text is not at hand.
    """

    program: str
    name: str
    seconds: float
    times: int
    operation: Operation | None


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where the time of a function went.

    Attributes:
      seconds: from its start to the end of its work on the device.
      operations: executed on the device.
    """

    seconds: float
    operations: tuple[Timed, ...]

    @property
    def busy(self) -> float:
        """Seconds in which the device executed an operation."""
        return sum(one.seconds for one in self.operations)


@dataclasses.dataclass(frozen=True, order=True)
class _Event:
    start: float
    end: float
    line: int
    program: tuple[str, int]
    name: str


def trace(run: Callable[[], object]) -> Timeline:
    """Runs a function under the profiler.

    Args:
      run: waits for its work on the device; its programs must have been compiled before.

    Raises:
      RuntimeError: the profiler recorded no operation of a program.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = _events(ProfileData.from_file(str(file)))
    if not events:
        raise RuntimeError("the profiler recorded no operation of a program on this device")
    times = Counter((event.program, event.name) for event in events)
    found, shared = _program_operations(events), _shared_seconds(events)
    return Timeline(
        seconds,
        tuple(
            Timed(key[0][0], key[1], shared[key], times[key], found.get(key[0], {}).get(key[1]))
            for key in sorted(times, key=lambda key: -shared[key])
        ),
    )


def _events(data: ProfileData) -> list[_Event]:
    """Returns the events of operations: those on devices, or on the host if no device has any (as on CPU)."""
    hosts, devices = [], []
    lines = ((plane, line) for plane in data.planes for line in plane.lines)
    for number, (plane, line) in enumerate(lines):
        into = devices if plane.name.startswith("/device:") else hosts
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and "hlo_module" in stats:
                program = str(stats["hlo_module"]), int(stats.get("program_id", 0))
                into.append(_Event(event.start_ns, event.end_ns, number, program, str(stats["hlo_op"])))
    return sorted(devices or hosts)


def _shared_seconds(events: Iterable[_Event]) -> Counter[tuple[tuple[str, int], str]]:
    """Splits each moment among the operations that run in it, the innermost of each line."""
    marks = sorted(
        mark
        for event in events
        for mark in (
            # Of operations that start together, the longest contains the others.
            (event.start, 1, event.start - event.end, event.line, (event.program, event.name)),
            (event.end, 0, 0.0, event.line, (event.program, event.name)),
        )
    )
    stacks: dict[int, list[tuple[tuple[str, int], str]]] = {}
    shared: Counter[tuple[tuple[str, int], str]] = Counter()
    before = 0.0
    for now, is_start, _, line, key in marks:
        running = [stack[-1] for stack in stacks.values() if stack]
        for one in running:
            shared[one] += (now - before) / len(running) / 1e9
        stack = stacks.setdefault(line, [])
        if is_start:
            stack.append(key)
        else:
            stack.remove(key)
        before = now
    return shared


def _program_operations(events: Iterable[_Event]) -> dict[tuple[str, int], dict[str, Operation]]:
    """Finds the text of each program: of those with its name, the first that contains all its operations."""
    names: dict[tuple[str, int], set[str]] = {}
    for event in events:
        names.setdefault(event.program, set()).add(event.name)
    found = {}
    wanted = {program for program, _ in names}
    for executable in jax.local_devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name not in wanted:
                continue
            own = operations(module.to_string())
            for program, used in names.items():
                # Instructions of loops are in no `operations`, hence the names that remain may be some of them.
                if program[0] == module.name and program not in found and _fits(used, own):
                    found[program] = own
    return found


def _fits(used: set[str], own: dict[str, Operation]) -> bool:
    return all(name in own or name.split(".")[0] in ("while", "cond", "conditional") for name in used)
