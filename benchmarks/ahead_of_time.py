"""Checks whether a model of 8 billion parameters fits TPUs that are not available: the estimate against XLA's plan.

    pip install libtpu && python benchmarks/ahead_of_time.py

Compiles the step for TPU topologies on any machine (half a minute for each mesh) and compares the memory that XLA plans
with the estimate that `train.py` prints before a run. Prints a table and writes JSON.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import common
from benchmarks.shapes import lower_step
from spt_jax.models.config import DecoderConfig
from spt_jax.models.kernels import Kernel
from spt_jax.models.rope import RopeConfig
from spt_jax.models.stacks import Remat
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.training.cost import StepShape, step_memory

# The sizes of Llama 3.1 8B.
CONFIG = DecoderConfig(
    family="llama",
    vocab_size=128_256,
    width=4_096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    mlp_width=14_336,
    max_positions=131_072,
    rope=RopeConfig(theta=500_000.0),
)
SHORT, LONG = {"length": 512, "outputs": 128, "lead": 100}, {"length": 4096, "outputs": 128, "lead": 100}
STEPS: tuple[tuple[str, dict[str, int], Remat, Kernel, StepShape], ...] = (
    ("v5e:2x4", {"fsdp": 8}, "full", "xla", StepShape(rows=32, **SHORT)),
    ("v5e:2x4", {"fsdp": 2, "tensor": 4}, "dots", "xla", StepShape(rows=16, **SHORT)),
    ("v5e:2x4", {"fsdp": 4, "sequence": 2}, "full", "xla", StepShape(rows=4, **LONG)),
    ("v5e:2x4", {"fsdp": 4, "tensor": 2}, "full", "xla", StepShape(rows=4, **LONG)),
    ("v5e:2x4", {"fsdp": 4, "tensor": 2}, "full", "splash", StepShape(rows=4, **LONG)),
    ("v5e:8x8", {"fsdp": 64}, "full", "xla", StepShape(rows=256, **SHORT)),
)
PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "libtpu")


def compare(topology: str, axes: dict[str, int], remat: Remat, attention: Kernel, shape: StepShape) -> dict[str, Any]:
    """Returns the bytes per device by the estimate and by XLA's plan, for one mesh."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = make_mesh(MeshConfig(**axes), devices)
    start = time.perf_counter()
    step = lower_step(CONFIG, shape, mesh=mesh, dtype=jnp.bfloat16, remat=remat, attention=attention)
    plan = step.compile().memory_analysis()
    estimate = step_memory(CONFIG, shape, remat=remat, itemsize=2, mesh=mesh)
    return {
        "device": devices[0].device_kind,
        "topology": topology,
        "mesh": axes,
        "remat": remat,
        "attention": attention,
        "shape": dataclasses.asdict(shape),
        "planned_bytes": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        "estimated_bytes": estimate.total,
        "estimate": dataclasses.asdict(estimate),
        "compile_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "ahead_of_time.json")
    options = parser.parse_args()
    found = []
    for step in STEPS:
        found.append(compare(*step))
        print(f"{step[1]}: {found[-1]['compile_seconds']:.0f} s", flush=True)
    rows = [
        [
            ", ".join(f"{axis} {size}" for axis, size in one["mesh"].items()),
            one["remat"],
            one["attention"],
            f"{one['shape']['rows']} x {one['shape']['length']}",
            f"{one['planned_bytes'] / 2**30:.2f}",
            f"{one['estimated_bytes'] / 2**30:.2f}",
        ]
        for one in found
    ]
    print(common.table(("mesh", "remat", "attention", "rows x tokens", "GiB planned by XLA", "GiB estimated"), rows))
    report = {
        "benchmark": "ahead_of_time",
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "steps": found,
    }
    common.write_json(options.out, report)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
