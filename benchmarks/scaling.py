"""Measures scaling by counting what each device computes and receives as the number of devices grows.

    python benchmarks/scaling.py

Compiles the step of a Llama of 42 M parameters for 1 to 8 simulated CPU devices along every axis of the mesh, and
counts matrix products and collectives in XLA's program. The number of rows grows with data and fsdp, their length with
sequence; along tensor the batch is fixed. No step runs. Prints a table and writes JSON.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.program import count
from benchmarks.shapes import lower_step
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.training.cost import StepShape, step_flops

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=32_000,
    width=512,
    layers=8,
    heads=8,
    kv_heads=8,
    head_size=64,
    mlp_width=1_376,
    max_positions=4_096,
    tied=True,
    rope=RopeConfig(),
)
ROWS, LENGTH, OUTPUTS, LEAD = 8, 256, 32, 32
PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax")


def measure(axis: str, devices: int) -> dict[str, Any]:
    """One mesh: the number of rows grows with data and fsdp, their length with sequence, nothing with tensor."""
    rows = ROWS * (devices if axis in ("data", "fsdp") else 1)
    length = LENGTH * (devices if axis == "sequence" else 1)
    shape = StepShape(rows=rows, length=length, outputs=OUTPUTS, lead=LEAD)
    mesh = make_mesh(MeshConfig(**{axis: devices}))
    work = count(lower_step(CONFIG, shape, mesh=mesh, remat="none").compile().as_text())
    needed = step_flops(CONFIG, shape).total / devices
    return {
        "axis": axis,
        "devices": devices,
        "rows": rows,
        "length": length,
        "flops_per_device": work.flops,
        "flops_over_formula": work.flops / needed,
        "collective_bytes_per_device": work.collective_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "scaling.json")
    options = parser.parse_args()
    found = [measure("data", 1)]
    for axis in ("data", "fsdp", "tensor", "sequence"):
        found += [measure(axis, devices) for devices in (2, 4, 8)]
    header = ["axis", "devices", "rows", "length", "GFLOP per device", "of the formula", "MB received per device"]
    rows = [
        [
            one["axis"],
            str(one["devices"]),
            str(one["rows"]),
            str(one["length"]),
            f"{one['flops_per_device'] / 1e9:.1f}",
            f"{one['flops_over_formula']:.2f}",
            f"{one['collective_bytes_per_device'] / 1e6:.1f}",
        ]
        for one in found
    ]
    print(common.table(header, rows))
    report = {
        "benchmark": "scaling",
        "config": dataclasses.asdict(CONFIG),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "meshes": found,
    }
    common.write_json(options.out, report)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
