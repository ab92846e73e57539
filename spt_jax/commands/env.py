"""`spt-jax env`: shows versions, devices, and what an accelerator needs."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import spt_jax
from spt_jax.runtime.extras import EXTRAS, installed

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
# The NVIDIA drivers that each CUDA release of JAX needs (docs.jax.dev, installation).
CUDA_DRIVERS = {"cuda13": 580, "cuda12": 525}


def main() -> None:
    """Shows versions, the devices that JAX finds, and what an accelerator needs."""
    print(f"spt_jax {spt_jax.__version__}, Python {platform.python_version()}, {platform.platform()}", flush=True)
    for name in (*PACKAGES, *PLUGINS):
        if (version := _version(name)) is not None:
            print(f"{name} {version}")
    missing = sorted({extra for module, extra in EXTRAS.items() if not installed(module)})
    print(f"extras that are not installed: {', '.join(missing) or 'none'}", flush=True)
    platforms, lines = _devices()
    print("\n".join(lines))
    driver = nvidia_driver()
    advice = accelerator_advice(platforms, driver, has_tpu=_has_tpu())
    if advice is not None:
        print(advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[set[str], list[str]]:
    """Returns the platforms of JAX's devices, and lines that describe the devices."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a plugin is installed, and its device does not start
        return set(), [f"JAX finds no device: {error}"]
    kinds = [f"{device.platform} {device.device_kind}" for device in devices]
    lines = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    return {device.platform for device in devices}, [f"devices: {', '.join(lines)}; {os.cpu_count()} CPU cores"]


def nvidia_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Returns the version of the NVIDIA kernel driver, such as "580.65.06"; None if there is none."""
    try:
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return None if found is None else found[1]


def _has_tpu() -> bool:
    """Returns whether this machine seems to be a TPU host."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(name in os.environ for name in ("TPU_NAME", "TPU_WORKER_ID"))


def accelerator_advice(platforms: set[str], driver: str | None, *, has_tpu: bool) -> str | None:
    """Returns what to do so that JAX finds an accelerator; None if it has one.

    Args:
      platforms: those of JAX's devices, such as {"cpu"}.
      driver: the version of the NVIDIA driver, or None.
      has_tpu: whether the machine has TPUs.
    """
    if platforms - {"cpu"}:
        return None
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return f"no accelerator: JAX_PLATFORMS is {chosen}; unset it to let JAX choose"
    if has_tpu:
        return "there is a TPU that JAX does not use: pip install 'spt_jax[tpu]'"
    if driver is None:
        extras = ", ".join(
            f"'spt_jax[{extra}]' (NVIDIA driver {least} or newer)" for extra, least in CUDA_DRIVERS.items()
        )
        return f"no accelerator found; with one, pip install one of {extras}, 'spt_jax[tpu]'"
    major = int(driver.partition(".")[0])
    for extra, least in CUDA_DRIVERS.items():
        if major >= least:
            return f"there is an NVIDIA GPU (driver {driver}) that JAX does not use: pip install 'spt_jax[{extra}]'"
    least = min(CUDA_DRIVERS.values())
    return f"the NVIDIA driver {driver} is too old for JAX; install {least} or newer, then 'spt_jax[cuda12]'"
