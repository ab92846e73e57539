"""Facts about the device as JAX reports them, and settings of the processes that use it."""

import os
from collections.abc import Mapping
from typing import Any

PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "peft", "numpy")
# Nearly all memory, like torch; JAX takes three quarters by default.
_ALL_MEMORY = "0.92"


def settings(tiny: bool, cache: str) -> dict[str, str]:
    """Returns environment variables for a stage: platforms, a shared compilation cache, no downloads.

    Args:
      tiny: whether to use the CPU, unless the environment names another platform.
      cache: directory for compiled programs, unless the environment names one.
    """
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    platforms = os.environ.get("JAX_PLATFORMS", "cpu" if tiny else "")
    if platforms and "cpu" not in platforms.split(","):
        platforms += ",cpu"  # the reference of the first stage
    if platforms:
        found["JAX_PLATFORMS"] = platforms
    if tiny:  # compiling takes nearly all of the time
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        found |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return found


def memory_settings() -> dict[str, str]:
    """Returns environment variables for the only process on a device, unless the environment sets the memory share."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # newer and older JAX; both is an error
    return {} if any(name in os.environ for name in names) else {names[0]: _ALL_MEMORY}


def facts() -> dict[str, Any]:
    """Returns the device's name, its platform, the number of devices, and the memory of one in bytes."""
    import jax

    from spt_jax.runtime import measure

    return {
        "device": measure.device_name(),
        "platform": jax.default_backend(),
        "devices": len(jax.devices()),
        "memory_bytes": measure.memory_limit(),
    }


def fused_kernel() -> str:
    """Returns the fused attention kernel of the default device; "xla" if it has none."""
    import jax

    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")


def torch_device() -> Any:
    """Returns the GPU if torch has one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_stages(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the device facts of the first stage that recorded them."""
    names = ("device", "platform", "devices", "memory_bytes")
    return next(({name: own[name] for name in names} for own in stages.values() if "device" in own), {})


def of_first(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the device facts of the first row that recorded them."""
    return next((dict(row["facts"]) for row in rows.values() if "facts" in row), {})
