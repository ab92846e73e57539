"""One run in several processes: how they find each other, agree, stop together and fail together.

Every process runs the same program on its own devices. The first one alone writes and speaks. What passes between them
outside XLA's collectives goes through the key-value store of `jax.distributed`, whose client has no public name.
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
_PATIENCE_MS = 24 * 3600 * 1000  # Of a wait for another process, which ends earlier if that one fails.
_HEARD_SECONDS = 3.0  # The store ends with the first process: others get this long to hear why.
_BEAT_SECONDS = 2.0
_LOST_SECONDS = 45.0  # without a sign of life; JAX itself ends a run, with a native stack trace, after 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How this process finds the others of its run; alone unless asked.

    Attributes:
      detect: ask the TPU slice, SLURM, Open MPI or Kubernetes job that started it.
      coordinator: host:port of the first process, which must be free there.
      count: processes in all.
      index: which of them this is, from 0.
    """

    detect: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [f"--processes.{name}" for name, value in given.items() if value is None]
        if self.detect and len(missing) < 3:
            raise ConfigError("--processes.detect finds the others by itself; leave out the other --processes")
        if 0 < len(missing) < 3:
            raise ConfigError(f"{' and '.join(missing)} must be given too, or --processes.detect alone")
        if not missing and not 0 <= self.index < self.count:  # type: ignore[operator]
            raise ConfigError(f"--processes.index is {self.index}; of {self.count} processes it is 0 to one below that")

    @property
    def several(self) -> bool:
        return self.detect or self.coordinator is not None


def leads() -> bool:
    """Whether this is the first process, or the only one."""
    return jax.process_index() == 0


@contextlib.contextmanager
def joined(config: ProcessesConfig) -> Iterator[None]:
    """Runs as one of several processes. The first that fails ends all of them; each says which it was and why.

    Process 0 alone writes to stdout. An error with `all_processes` is raised by all and fails none. Must be entered
    before anything asks for a device.

    Raises:
      ConfigError: nothing tells where the others are, or JAX was in use before.
    """
    if not config.several:
        yield
        return
    where = "the others" if config.coordinator is None else f"{config.coordinator}, process {config.index}"
    print(f"waiting for {config.count or 'all'} processes: {where}", file=sys.stderr)
    if xla_bridge.backends_are_initialized():
        raise ConfigError("this process cannot join the others: JAX was used before")
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
    # Looked up once: in a process on its way out, asking would start the devices anew.
    index = jax.process_index()
    listener = threading.Thread(target=_end_with_the_first_failure, args=(index,), daemon=True)
    listener.start()
    signs = SignsOfLife(index, jax.process_count())
    signs.start()

    def stopped(number: int) -> None:
        """The listener of each process, this one's too, ends it."""
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
            signs.wait_for_loss()  # A collective breaks before the loss of the process that broke it is certain.
        if not getattr(error, "all_processes", False):
            _tell(error, index)
            listener.join()
        raise
    finally:
        jax.distributed.shutdown()  # A barrier: signs are given until all processes are there.
        signs.stop()
        listener.join()


class SignsOfLife:
    """Each process gives a sign every few seconds in the store; one that gives none for long ends the others.

    So does one that was killed, one that is frozen and one that cannot be reached: the others say which it is, and end
    with exit code 1.
    """

    def __init__(self, index: int, count: int):
        self._index, self._signs = index, dict.fromkeys(range(count), "")
        self._heard = dict.fromkeys(range(count), time.monotonic())
        self._answered = time.monotonic()  # by the store, which is in the first process
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to give signs and to look for those of the others, in two threads: an unreachable store hangs one."""
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """The run is over: nothing is looked for."""
        self._over.set()

    def wait_for_loss(self) -> None:
        """Gives a process that may be lost the time to be found out, in which case this does not return."""
        time.sleep(3 * _BEAT_SECONDS)
        if time.monotonic() - min(self._heard.values()) > 2 * _BEAT_SECONDS:
            time.sleep(_LOST_SECONDS)

    def lost(self, now: float) -> int | None:
        """The process that has given no sign for too long; the first where the store itself is silent."""
        if now - self._answered > _LOST_SECONDS:
            return 0
        return next((i for i, heard in self._heard.items() if now - heard > _LOST_SECONDS), None)

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(_BEAT_SECONDS):
            number += 1
            # The client is gone after the shutdown.
            with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
                _client().key_value_set(f"{_ALIVE}{self._index}", str(number), allow_overwrite=True)
                signs = dict(_client().key_value_dir_get(_ALIVE))
                self._answered = time.monotonic()
                for key, sign in signs.items():
                    index = int(key.rpartition("/")[2])
                    if self._signs[index] != sign:
                        self._signs[index], self._heard[index] = sign, self._answered

    def _look(self) -> None:
        while not self._over.wait(1.0):
            lost = self.lost(time.monotonic())
            if lost is None or lost == self._index:
                continue
            print(
                f"error: process {lost} has given no sign of life for {_LOST_SECONDS:.0f} s: it was killed, hangs, or"
                " cannot be reached. Start all again with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _tell(error: BaseException, index: int) -> None:
    """Says what failed, here and to the other processes, unless one of them was first."""
    known = isinstance(error, SptError)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    print(f"error: {error}" if known else traceback.format_exc(), file=sys.stderr)
    failure = {"process": index, "reason": reason, "exit_code": getattr(error, "exit_code", 1)}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_FAILURE, json.dumps(failure))


def _end_with_the_first_failure(index: int) -> None:
    """Waits in a thread of its own, for the main one may hang in a collective that the failed process will not join."""
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
    """What `make` gives on the first process, which alone calls it. A plain JSON value; the others wait for it.

    name: in a run, every call has its own.
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
    """Compares plain JSON values with those of the first process. None goes on before all have agreed.

    Raises:
      ConfigError: some differ; says which.
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
    """Whether any of several processes got SIGTERM, such as a preemption notice: true in all of them at one step.

    Every process calls it once for every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
