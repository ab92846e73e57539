"""What a run cost: memory, compile time, device and versions."""

import functools
import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


def compile_clock() -> Callable[[], float]:
    """Starts counting; the function returned gives the seconds that XLA has compiled since."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def device_name() -> str:
    """The kind of the first device, on a CPU with the processor's name."""
    device = jax.devices()[0]
    return f"cpu ({_processor()})" if device.platform == "cpu" else device.device_kind


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The most that a device has held; on CPU, the most that the process has been resident."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def peak_flops(dtype: Any) -> float:
    """Floating-point operations per second of one device: the best of five large matrix products, timed here."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def versions() -> dict[str, str]:
    """Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


def step_memory(step: Any, state: Any, batch: Any, frozen: Any) -> str:
    """A sentence on the memory of a compiled step per device, from XLA's own accounting.

    Args:
      step: what `make_train_step` returned.
    """
    analysis = step.func.lower(*step.args, state, batch).compile().memory_analysis()
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(frozen))
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return (
        f"memory of a step on each device: {total / 2**20:,.0f} MiB (weights {weights / 2**20:,.0f}, activations and"
        f" other temporaries {analysis.temp_size_in_bytes / 2**20:,.0f})"
    )
