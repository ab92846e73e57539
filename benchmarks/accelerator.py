"""Runs all checks and measurements for a GPU or TPU in one call.

    python benchmarks/accelerator.py                          # 8 minutes; results in out/accelerator
    python benchmarks/accelerator.py --stages train --seconds 540 --out DIR
    python benchmarks/accelerator.py --tiny                   # tiny shapes on the CPU, to test the script itself

right: the device computes the same as the CPU. train: training steps in the shape of Llama-3.2-3B against PEFT's.
serve: up to 1,000 prompts on one base. population: prompts trained side by side. quickstart: the shipped task.

Each stage runs in a separate process with a share of the remaining time. Later stages get the time that it does not
use. A stage that fails or runs out of time is reported, and the next one starts. Every stage writes its measurements
so far to a JSON file in the directory, which is valid at any moment. accelerator.json contains all of them and the
targets, accelerator.log the output of the processes. Nothing outside the repository is read. Exit code 0 if all stages
passed.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, run_process, terminated_as_exit
from benchmarks.accelerator_stages.targets import targets

ROOT = Path(__file__).resolve().parents[1]
RESULT, LOG = "accelerator.json", "accelerator.log"
# The part of a stage's time in which it may end by itself before it is killed.
_GRACE_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      module: dotted name of a module with `run(task, record)`.
      weight: its share of the time, relative to the other stages'.
      environment: environment variables of its process.
    """

    module: str
    weight: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


_PACKAGE = "benchmarks.accelerator_stages"
# Several processes of the first stage share the device.
STAGES = {
    "right": Stage(f"{_PACKAGE}.right", 3.0, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
    "train": Stage(f"{_PACKAGE}.train", 5.0),
    "serve": Stage(f"{_PACKAGE}.serve", 2.5),
    "population": Stage(f"{_PACKAGE}.population", 2.0),
    "quickstart": Stage(f"{_PACKAGE}.quickstart", 1.5),
}


def run_stages(stages: Mapping[str, Stage], *, seconds: float, out: Path, tiny: bool) -> int:
    """Runs the stages in order and writes their results.

    Args:
      stages: by name.
      seconds: for all stages together.
      out: directory of the results.
      tiny: whether to run tiny shapes.

    Returns:
      0 if all passed or were skipped, else 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    for name in (*(f"{stage}.json" for stage in stages), LOG):
        (out / name).unlink(missing_ok=True)  # from an earlier call
    report = Record(
        out / RESULT,
        benchmark="accelerator",
        status="running",
        tiny=tiny,
        seconds_asked=seconds,
        machine=common.machine(os.cpu_count() or 1),
        versions=common.versions(device.PACKAGES),
        commit=common.commit() or None,
        stages={},
        targets=targets({}),
    )
    remaining = dict(stages)
    with tempfile.TemporaryDirectory() as cache:
        for name, stage in stages.items():
            share = stage.weight / sum(other.weight for other in remaining.values())
            remaining.pop(name)
            stage_seconds = share * (deadline - time.monotonic()) - _GRACE_SECONDS
            if stage_seconds <= 0:
                found = {"status": "out of time", "error": "no time was left for this stage", "seconds": 0.0}
                common.write_json(out / f"{name}.json", found)
            else:
                found = run_process(
                    stage.module,
                    out / f"{name}.json",
                    seconds=stage_seconds,
                    grace=_GRACE_SECONDS,
                    tiny=tiny,
                    log=out / LOG,
                    environment=device.settings(tiny, cache) | stage.environment,
                    own_group=True,
                )
            report.put("stages", name, found)
            content = report.content["stages"]
            report.update(targets=targets(content), **device.of_stages(content))
            print(line(name, found), flush=True)
    bad = [name for name, found in report.content["stages"].items() if found["status"] not in ("passed", "skipped")]
    report.update(status="failed" if bad else "passed")
    for name, target in report.content["targets"].items():
        if target["met"] is not None:
            print(f"{'met' if target['met'] else 'NOT MET'}: {name}: {target['measured']:.3g} ({target['of']})")
    print(f"{len(stages) - len(bad)} of {len(stages)} stages passed; written to {out / RESULT}", flush=True)
    return 1 if bad else 0


def line(name: str, found: Mapping[str, Any]) -> str:
    """Returns one line about a stage that has ended."""
    parts = [found.get("summary"), " ".join(found["error"].split())[:500] if found.get("error") else None]
    missing = found.get("not_measured")
    parts.append(f"not measured: {', '.join(missing)}" if missing else None)
    return f"{name}: {found['status']} in {found['seconds']:.0f} s" + "".join(f"; {part}" for part in parts if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all stages together")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "accelerator", help="directory of the results")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU unless JAX_PLATFORMS is set")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error("--seconds must be above 0")
    chosen = {name: stage for name, stage in STAGES.items() if name in args.stages}
    with terminated_as_exit():
        return run_stages(chosen, seconds=args.seconds, out=args.out.resolve(), tiny=args.tiny)


if __name__ == "__main__":
    sys.exit(main())
