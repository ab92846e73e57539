"""Measurements of a run: memory, compile time, device, speed and package versions."""

import functools
import importlib.metadata
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spt_jax.errors import ConfigError
from spt_jax.runtime.remote import url_of

PROFILE_BEHIND = 3  # Steps to skip before a trace: they compile and warm up.
_PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


def compile_clock() -> Callable[[], float]:
    """Starts a clock, and returns a function that returns the seconds XLA has spent compiling since."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def device_name(device: Any = None) -> str:
    """Returns the kind of a device (default: the first one); for a CPU, with the name of the processor."""
    device = device or jax.devices()[0]
    return f"cpu ({_processor()})" if device.platform == "cpu" else device.device_kind


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU, such as (9, 0); None for other devices.

    AMD GPUs report the name of an architecture instead.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return None if found is None else (int(found[1]), int(found[2]))


def computes_in_bfloat16(device: Any) -> bool:
    """Returns whether the device is an accelerator with bfloat16: NVIDIA GPUs need compute capability 8.0 (Ampere)."""
    capability = compute_capability(device)
    return device.platform != "cpu" and (capability is None or capability >= (8, 0))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Returns the peak memory of any local device in bytes; on CPU, the peak resident memory of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_compiled_programs(directory: Path | None = None) -> None:
    """Enables the persistent compilation cache of XLA.

    Args:
      directory: of the cache. Defaults to the directory that JAX is configured with (JAX_COMPILATION_CACHE_DIR) or, on
        an accelerator, to ~/.cache/spt_jax. On a CPU there is no default: a program compiled for one CPU may fail on
        another that shares the home directory. If the directory cannot be written, a line on stderr reports it, and
        nothing is cached.

    Raises:
      ConfigError: the directory is a URL.
    """
    if directory is not None and (url := url_of(directory)):
        raise ConfigError(
            f"the compilation cache {url} is remote; give a local directory, or set JAX_COMPILATION_CACHE_DIR"
        )
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if directory is None and (configured is not None or jax.default_backend() == "cpu"):
        return
    try:
        directory = directory or Path.home() / ".cache" / "spt_jax"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        print(f"compiled programs are not cached for the next run: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


class Profile:
    """A trace of training steps for xprof, with the named scopes of the model.

    Args:
      directory: where the trace is written.
      steps: number of steps to trace after the first `PROFILE_BEHIND`; 0 for no trace.
    """

    def __init__(self, directory: Path, steps: int):
        self._directory, self._first, self._last = directory, PROFILE_BEHIND, PROFILE_BEHIND + steps
        self._running = False

    def before_step(self, number: int, settle: Callable[[], None]) -> None:
        """Starts or stops the trace if it begins or ends at this step.

        Args:
          number: of the step, from 0.
          settle: waits for the previous steps.
        """
        if self._first < self._last and number in (self._first, self._last):
            settle()
            self.close()
            if number == self._first:
                jax.profiler.start_trace(self._directory)
                self._running = True

    def close(self) -> None:
        """Stops a running trace and writes it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


@functools.cache
def peak_flops(dtype: Any) -> float:
    """Measures the floating-point operations per second of one device: the best of five large matrix products."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def memory_limit() -> int | None:
    """Returns the memory of the smallest local device in bytes; None if devices do not report it, as on CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((limit for limit in limits if limit), default=None)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


def planned_memory(step: Any, state: Any, batch: Any, params: Any) -> str:
    """Returns a line on the memory per device that a compiled training step needs, as planned by XLA.

    Args:
      step: result of `make_train_step`.
      state: training state.
      batch: a batch.
      params: the frozen arrays of the base.
    """
    analysis = step.func.lower(*step.args, state, batch).compile().memory_analysis()
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return (
        f"memory of a step per device, as planned by XLA: {total / 2**20:,.0f} MiB (weights {weights / 2**20:,.0f},"
        f" activations and other temporaries {analysis.temp_size_in_bytes / 2**20:,.0f})"
    )
