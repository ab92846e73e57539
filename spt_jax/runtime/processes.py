"""Runs of several processes: how they find each other, agree, stop together and fail together.

Every process runs the same program on its own devices. Only the first process writes files and prints. All
communication outside XLA collectives uses the key-value store of `jax.distributed`, whose client has no public API.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import xla_bridge
from jax.experimental import multihost_utils

from spt_jax.errors import ConfigError, SptError, differing_fields
from spt_jax.runtime import signals
from spt_jax.runtime.rendezvous import meet

T = TypeVar("T")

_FAILURE = "spt_jax/failure"
_ALIVE = "spt_jax/alive/"
_PATIENCE_MS = 24 * 3600 * 1000  # Limit of a wait for another process; it ends earlier if that process fails.
_HEARD_SECONDS = 3.0  # The store ends with the first process; the others have this long to read why.
_BEAT_SECONDS = 2.0
_LOST_SECONDS = 45.0  # without a heartbeat; after 100, JAX itself ends a run with a native stack trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How this process finds the other processes of its run. By default there are none.

    Attributes:
      detect: find them through the TPU slice, SLURM, Open MPI or Kubernetes job that started this process.
      coordinator: host:port of the first process; the port must be free there.
      count: number of processes.
      index: index of this process, from 0.
    """

    detect: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [f"--processes.{name}" for name, value in given.items() if value is None]
        if self.detect and len(missing) < 3:
            raise ConfigError("--processes.detect finds the others by itself; leave out the other --processes options")
        if 0 < len(missing) < 3:
            raise ConfigError(f"{' and '.join(missing)} must be given too, or only --processes.detect")
        if not missing and not 0 <= self.index < self.count:  # type: ignore[operator]
            raise ConfigError(
                f"--processes.index is {self.index}; it must be at least 0 and below the count, {self.count}"
            )

    @property
    def several(self) -> bool:
        return self.detect or self.coordinator is not None


def leads() -> bool:
    """Returns whether this is the first or only process."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(config: ProcessesConfig) -> Iterator[None]:
    """Runs as one of several processes. The first failure ends all of them; each reports which process failed and why.

    Only process 0 writes to stdout. An error with `all_processes` set is raised in all processes and is not reported as
    a failure of one. Must be entered before anything uses a device.

    Raises:
      ConfigError: the others cannot be found, or JAX was already in use.
    """
    if not config.several:
        yield
        return
    where = "the others" if config.coordinator is None else f"{config.coordinator}, process {config.index}"
    print(f"waiting for {config.count or 'all'} processes: {where}", file=sys.stderr)
    if xla_bridge.backends_are_initialized():
        raise ConfigError("this process cannot join the others: JAX is already in use")
    if config.coordinator is not None:
        assert config.count is not None and config.index is not None
        meet(config.coordinator, config.count, config.index)
    try:
        jax.distributed.initialize(config.coordinator, config.count, config.index)
    except ValueError as error:
        raise ConfigError(
            f"--processes.detect found no TPU slice, SLURM, Open MPI or Kubernetes job ({error}); give"
            " --processes.coordinator, --processes.count and --processes.index"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"this process cannot join the others: {error}") from error
    # Looked up once: while a process shuts down, a lookup would initialize the devices again.
    index = jax.process_index()
    listener = threading.Thread(target=_end_with_the_first_failure, args=(index,), daemon=True)
    listener.start()
    heartbeats = Heartbeats(index, jax.process_count())
    heartbeats.start()

    def stopped(number: int) -> None:
        """Reports the signal; the listener in each process, including this one, then ends it."""
        reason = f"stopped by {signal.Signals(number).name}"
        failure = {"process": index, "reason": reason, "exit_code": 128 + number}
        _client().key_value_set(_FAILURE, json.dumps(failure))

    try:
        with (
            signals.telling(stopped),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere if index else sys.stdout),
        ):
            yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            heartbeats.wait_for_loss()  # A collective fails before it is certain which process was lost.
        if not getattr(error, "all_processes", False):
            _tell(error, index)
            listener.join()
        raise
    finally:
        jax.distributed.shutdown()  # A barrier: heartbeats continue until all processes reach it.
        heartbeats.stop()
        listener.join()


class Heartbeats:
    """Heartbeats of the processes in the key-value store. If those of one process stop, the others end.

    The process may have been killed, be frozen or be unreachable. The others print which one it is, and end with exit
    code 1.

    Args:
      index: index of this process.
      count: number of processes.
    """

    def __init__(self, index: int, count: int):
        self._index, self._beats = index, dict.fromkeys(range(count), "")
        self._heard = dict.fromkeys(range(count), time.monotonic())
        self._answered = time.monotonic()  # last answer of the store, which runs in the first process
        self._over = threading.Event()

    def start(self) -> None:
        """Starts sending and checking heartbeats, in two threads: an unreachable store blocks the first."""
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """Ends both threads, because the run is over."""
        self._over.set()

    def wait_for_loss(self) -> None:
        """Waits until it is clear whether a process is lost; if one is, this does not return."""
        time.sleep(3 * _BEAT_SECONDS)
        if time.monotonic() - min(self._heard.values()) > 2 * _BEAT_SECONDS:
            time.sleep(_LOST_SECONDS)

    def lost(self, now: float) -> int | None:
        """Returns the process without a heartbeat for too long, 0 if the store does not answer, or None."""
        if now - self._answered > _LOST_SECONDS:
            return 0
        return next((i for i, heard in self._heard.items() if now - heard > _LOST_SECONDS), None)

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(_BEAT_SECONDS):
            number += 1
            # After the shutdown there is no client.
            with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
                _client().key_value_set(f"{_ALIVE}{self._index}", str(number), allow_overwrite=True)
                beats = dict(_client().key_value_dir_get(_ALIVE))
                self._answered = time.monotonic()
                for key, beat in beats.items():
                    index = int(key.rpartition("/")[2])
                    if self._beats[index] != beat:
                        self._beats[index], self._heard[index] = beat, self._answered

    def _look(self) -> None:
        while not self._over.wait(1.0):
            lost = self.lost(time.monotonic())
            if lost is None or lost == self._index:
                continue
            print(
                f"error: process {lost} has sent no heartbeat for {_LOST_SECONDS:.0f} s: it was killed, hangs, or"
                " cannot be reached. Start all processes again with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _tell(error: BaseException, index: int) -> None:
    """Reports a failure, here and to the other processes, unless another process has already failed."""
    known = isinstance(error, SptError)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    print(f"error: {error}" if known else traceback.format_exc(), file=sys.stderr)
    failure = {"process": index, "reason": reason, "exit_code": getattr(error, "exit_code", 1)}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_FAILURE, json.dumps(failure))


def _end_with_the_first_failure(index: int) -> None:
    """Runs in a separate thread, because the main one may hang in a collective that the failed process never joins."""
    try:
        failure = json.loads(_client().blocking_key_value_get(_FAILURE, _PATIENCE_MS))
    except jax.errors.JaxRuntimeError:
        return  # The run is over.
    if failure["process"] != index:
        print(f"error: process {failure['process']} failed: {failure['reason']}", file=sys.stderr)
    sys.stderr.flush()
    if index == 0:
        time.sleep(_HEARD_SECONDS)
    os._exit(failure["exit_code"])


def from_first(name: str, make: Callable[[], T]) -> T:
    """Returns the result of `make`, which only the first process calls; the others wait for it.

    Args:
      name: unique to this call within a run.
      make: returns a JSON value.
    """
    if jax.process_count() == 1:
        return make()
    key = f"spt_jax/{name}"
    if leads():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, _PATIENCE_MS))


def check_agreement(name: str, values: Callable[[], Mapping[str, Any]]) -> None:
    """Compares JSON values with those of the first process. No process continues before all agree.

    Raises:
      ConfigError: some values differ; it names them.
    """
    if jax.process_count() == 1:
        return
    differences = [
        f"{field} is {theirs!r} in process 0, {ours!r} in process {jax.process_index()}"
        for field, ours, theirs in differing_fields(values(), from_first(name, values))
    ]
    if differences:
        raise ConfigError("the processes of a run must agree on everything: " + "; ".join(differences))
    _client().wait_at_barrier(f"spt_jax/{name}", _PATIENCE_MS)


def stop_asked(step: int) -> bool:
    """Returns whether any process got SIGTERM, such as a preemption notice. True in all processes at the same step.

    Every process must call it once per step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
