"""Measures how the time and memory of a step, and of served prompts, grow with each size, against their formulas.

    python benchmarks/scale.py                               # about ten minutes on two idle cores

A step of prompt tuning on a random Llama, with one size changed at a time. Time: the median of steps; its formula is
the operations of the step's matrix products at the rate of the point in the middle, the only fitted number. Memory:
what XLA plans for arguments and temporaries; its formula is the estimate that a run prints. Devices: operations that
each of up to 8 simulated devices computes, counted in XLA's program. Prompts: seconds to register them, and bytes of
those in use on the device; their formula is the size of their keys and values. Writes JSON and one page of plots.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.png"
PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "numpy")
# P virtual tokens, T tokens of an example, B examples per batch, and the sizes of the model.
MIDDLE = {"P": 20, "T": 64, "B": 16, "vocabulary": 8_192, "layers": 8, "width": 256}
AXES: Mapping[str, Sequence[int]] = {
    "P": (5, 20, 50, 100, 200),
    "T": (16, 32, 64, 128, 256),
    "B": (4, 8, 16, 32, 64),
    "vocabulary": (1_024, 8_192, 32_768, 131_072),
    "layers": (2, 4, 8, 16, 32),
    "width": (128, 256, 512, 1_024),
}
DEVICE_AXES = ("data", "fsdp", "tensor", "sequence")
REGISTERED, IN_USE = (10, 100, 1_000, 10_000), (1, 10, 100, 1_000)
TARGETS = 4  # predicted tokens of an example
HEAD_SIZE = 32


def base_of(sizes: Mapping[str, int]) -> Any:
    """Returns a random Llama with two query heads for each key head and an MLP of four times the width."""
    from benchmarks.accelerator_stages.workload import Workload, random_base

    model = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["width"] // HEAD_SIZE,
        "num_key_value_heads": sizes["width"] // HEAD_SIZE // 2,
        "max_position_embeddings": 4_096,
        "tie_word_embeddings": True,
    }
    return random_base(Workload(model=model, dtype="float32"))


def step_point(sizes: Mapping[str, int], steps: int) -> dict[str, Any]:
    """Measures a step of the given sizes, with each example in a separate row."""
    import jax
    import numpy as np
    import optax

    from spt_jax.data.batches import pack, place_batch, plan_batches
    from spt_jax.data.examples import Example
    from spt_jax.prompts import PromptTuning
    from spt_jax.training.cost import step_flops, step_memory, step_shape
    from spt_jax.training.step import init_state, make_train_step

    base, lead, length = base_of(sizes), sizes["P"], sizes["T"]
    random = np.random.default_rng(0)
    predicted = np.arange(lead + length) >= lead + length - TARGETS
    virtual = sizes["vocabulary"] + np.arange(lead)
    examples = [
        Example(np.append(virtual, text).astype(np.int32), predicted, (), 0, i)
        for i, text in enumerate(random.integers(3, sizes["vocabulary"], (sizes["B"], length)))
    ]
    batch = pack(examples, plan_batches(examples, lead=lead, batch_size=sizes["B"], packing=False))
    method, optimizer = PromptTuning(length=lead), optax.adam(0.01)
    placed, step = place_batch(batch, base.mesh), make_train_step(base, method, optimizer)
    state = init_state(jax.random.key(0), base, method, optimizer)
    program: Any = step
    plan = program.func.lower(*program.args, state, placed).compile().memory_analysis()
    seconds = []
    for _ in range(steps + 2):  # the first two compile and warm up
        start = time.perf_counter()
        state, metrics = step(state, placed)
        float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    shape = step_shape(batch)
    estimate = step_memory(base.config, shape, remat="dots", itemsize=4, mesh=base.mesh)
    return {
        "sizes": dict(sizes),
        "seconds": statistics.median(seconds[2:]),
        "flops": step_flops(base.config, shape).total,
        "bytes": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        "formula_bytes": estimate.total,
    }


def prompt_points(registered: Sequence[int], in_use: Sequence[int]) -> dict[str, Any]:
    """Measures the registration of prompts, and the memory of those in use on the device."""
    from benchmarks.accelerator_stages.serve_spt_jax import fill_bank

    base = base_of(MIDDLE)
    found: dict[str, Any] = {"registered": [], "in_use": []}
    for count in registered:
        start = time.perf_counter()
        bank = fill_bank(base, count)
        found["registered"].append({"prompts": count, "seconds": time.perf_counter() - start})
    config, names = base.config, bank.names
    length = bank.held(names[0]).prefix.positions.shape[0]  # rounded up, so that few programs are compiled
    of_prompt = 4 * length * (2 * config.layers * config.kv_heads * config.head_size + 1)  # + 1 for its position
    done = 0
    for count in in_use:
        start = time.perf_counter()
        for name in names[done:count]:
            bank.held(name)
        seconds = (time.perf_counter() - start) / max(1, count - done)
        done = count
        point = {"prompts": count, "bytes": bank.device_bytes, "formula_bytes": count * of_prompt}
        found["in_use"].append({**point, "seconds_each": seconds})
    return found


def device_points() -> list[dict[str, Any]]:
    """Returns what benchmarks/scaling.py measures; it simulates devices, which needs a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scaling.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())["meshes"]


def measure(axes: Mapping[str, Sequence[int]], middle: Mapping[str, int], steps: int) -> dict[str, Any]:
    """Measures steps along the axes, the point in the middle once."""
    center = step_point(middle, steps)
    print(f"middle: {center['seconds'] * 1e3:.1f} ms", flush=True)
    found: dict[str, Any] = {}
    for axis, values in axes.items():
        found[axis] = [
            center if middle[axis] == value else step_point({**middle, axis: value}, steps) for value in values
        ]
        print(f"{axis}: " + ", ".join(f"{one['seconds'] * 1e3:.1f} ms" for one in found[axis]), flush=True)
    return {"flops_per_second": center["flops"] / center["seconds"], "axes": found}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws all curves on one page: measured points, and the formula as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 12), layout="constrained")
    axes = figure.subplots(4, 4)
    steps, rate = report["steps"]["axes"], report["steps"]["flops_per_second"]
    for column, (axis, points) in enumerate(steps.items()):
        values = [one["sizes"][axis] for one in points]
        row, own = 2 * (column // 4), column % 4
        time_, memory = axes[row, own], axes[row + 1, own]
        _curve(time_, values, [one["seconds"] * 1e3 for one in points], [one["flops"] / rate * 1e3 for one in points])
        mib = [[one[key] / common.MIB for one in points] for key in ("bytes", "formula_bytes")]
        _curve(memory, values, *mib)
        time_.set(title=axis, ylabel="ms per step" if own == 0 else "")
        memory.set(xlabel=axis, ylabel="MiB per step" if own == 0 else "")
    place = axes[2, 2]
    for axis in DEVICE_AXES:
        points = [one for one in report["devices"] if one["axis"] == axis or one["devices"] == 1]
        devices, share = ([one[key] for one in points] for key in ("devices", "flops_over_formula"))
        place.plot(devices, share, "o-", label=axis, markersize=4)
    place.set(title="devices", xlabel="devices", ylabel="operations per device / formula", ylim=(0.9, None))
    place.axhline(1, color="grey", linewidth=1)
    place.legend()
    used, registered = report["prompts"]["in_use"], report["prompts"]["registered"]
    _curve(
        axes[2, 3],
        [one["prompts"] for one in used],
        *([one[key] / common.MIB for one in used] for key in ("bytes", "formula_bytes")),
    )
    axes[2, 3].set(title="prompts in use", xlabel="prompts", ylabel="MiB")
    _curve(axes[3, 3], [one["prompts"] for one in registered], [one["seconds"] for one in registered], None)
    axes[3, 3].set(title="prompts registered", xlabel="prompts", ylabel="seconds")
    received = axes[3, 2]
    for axis in DEVICE_AXES:
        points = [one for one in report["devices"] if one["axis"] == axis]
        megabytes = [one["collective_bytes_per_device"] / 1e6 for one in points]
        received.plot([one["devices"] for one in points], megabytes, "o-", label=axis, markersize=4)
    received.set(xlabel="devices", ylabel="MB received per device")
    axes[0, 0].legend()
    figure.savefig(path, dpi=80)


def _curve(place: Any, values: Sequence[int], measured: Sequence[float], formula: Sequence[float] | None) -> None:
    if formula is not None:
        place.plot(values, formula, "-", color="grey", label="formula")
    place.plot(values, measured, "o", color="C0", label="measured")
    place.set_xscale("log", base=2 if max(values) / min(values) < 1000 else 10)
    place.set_yscale("log")
    place.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each point")
    parser.add_argument("--tiny", action="store_true", help="few tiny sizes, to test the script itself")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/scale_<machine>.json here")
    parser.add_argument("--page", type=Path, default=PAGE, help="PNG file of the plots")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    axes, middle, registered, in_use = AXES, MIDDLE, REGISTERED, IN_USE
    if options.tiny:
        middle = {"P": 2, "T": 8, "B": 2, "vocabulary": 64, "layers": 1, "width": 64}
        axes, registered, in_use = {name: (value, 2 * value) for name, value in middle.items()}, (2, 4), (1, 2)
    common.use_cores(2)
    report = {
        "benchmark": "scale",
        "machine": common.machine(2),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "steps": measure(axes, middle, options.steps),
        "prompts": prompt_points(registered, in_use),
        "devices": device_points(),
    }
    out = options.out or common.RESULTS / f"scale_{common.machine_name(2)}.json"
    common.write_json(out, report)
    draw(report, options.page)
    print(f"written to {out} and {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
