"""Compares the prompt length that a sweep picks, and the steps that it saves, with training every length.

    python benchmarks/sweep.py --task trec          # stories260K, from the folder of real data; about 20 minutes
    python benchmarks/sweep.py --task sms_spam

Trains every length with three seeds (`spt-jax sweep --patience 0`), then evaluates what the sweep would have
seen with its default patience: trials are the same, bit for bit on a CPU. An interrupted benchmark can be resumed.
Writes JSON and the plot of that sweep.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.family import TASKS
from spt_jax.evaluation.predictions import read_predictions, record_values
from spt_jax.reports.plots import plot_sweep
from spt_jax.studies.plateau import estimates, has_plateaued, shortest_of_the_best

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
SEEDS = (0, 1, 2)
PATIENCE = 2


def train(task: str, steps: int, workdir: Path) -> dict[str, Any]:
    """Trains all lengths to the end; returns the sweep's results."""
    numbers = {
        "--lengths": LENGTHS,
        "--seeds": SEEDS,
        "--patience": (0,),
        "--ensemble": (5,),
        "--train.steps": (steps,),
    }
    words = [word for name, values in numbers.items() for word in (name, *map(str, values))]
    if task == "sms_spam":  # some messages leave no room for the longest prompts
        words += ["--data.truncate", "text"]
    resume = ["--resume"] if (workdir / "config.json").exists() else []
    command = [sys.executable, "-m", "spt_jax", "sweep", *TASKS[task], "--workdir", str(workdir), *words, *resume]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((workdir / "results.json").read_text())


def values_of(workdir: Path, length_number: int, split: str) -> np.ndarray:
    """Returns whether each record was answered correctly, by seed."""
    trials = [length_number * len(SEEDS) + seed + 1 for seed in range(len(SEEDS))]
    files = [workdir / "trials" / f"{trial:03d}" / "predictions.jsonl" for trial in trials]
    return np.stack([record_values(read_predictions(file, by="split")[split], "accuracy") for file in files])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args(argv)
    workdir = options.workdir or ROOT / "out" / f"sweep-{options.task}"
    results = train(options.task, options.steps, workdir)
    validation = [values_of(workdir, number, "validation") for number in range(len(LENGTHS))]
    tests = estimates([values_of(workdir, number, "test") for number in range(len(LENGTHS))])
    tried = next(
        (n for n in range(1, len(LENGTHS) + 1) if has_plateaued(estimates(validation[:n]), PATIENCE)), len(LENGTHS)
    )
    picked = shortest_of_the_best(estimates(validation[:tried]))
    best = int(np.argmax([estimate.mean for estimate in tests]))
    low, high = tests[best].interval
    report = {
        "benchmark": "sweep",
        "task": options.task,
        "machine": common.machine(2),
        "versions": common.versions(("spt_jax", "jax", "jaxlib", "flax", "optax", "numpy")),
        "commit": common.commit(),
        "steps": options.steps,
        "seeds": SEEDS,
        "lengths": [
            {"length": length, "validation": own.as_json(), "test": test.as_json()}
            for length, own, test in zip(LENGTHS, estimates(validation), tests, strict=True)
        ],
        "patience": PATIENCE,
        "tried": LENGTHS[:tried],
        "share_of_steps": tried / len(LENGTHS),
        "picked": LENGTHS[picked],
        "best_on_test": LENGTHS[best],
        "picked_within_interval_of_best": low <= tests[picked].mean <= high,
        "ensemble_of_five": results["ensemble"],
    }
    for length, own, test in zip(LENGTHS, estimates(validation), tests, strict=True):
        print(f"{length:4d}  validation {own.mean:.3f}  test {test.mean:.3f} +- {test.standard_error:.3f}")
    print(
        f"{options.task}: tried {tried} of {len(LENGTHS)} lengths, picked {LENGTHS[picked]}: test"
        f" {tests[picked].mean:.3f}; the best, {LENGTHS[best]}, has {tests[best].mean:.3f} [{low:.3f}, {high:.3f}]"
    )
    common.write_json(common.RESULTS / f"sweep_{options.task}.json", report)
    seen = [
        ({"method.length": str(length)}, estimate, values.mean(axis=1).tolist())
        for length, estimate, values in zip(LENGTHS, estimates(validation[:tried]), validation, strict=False)
    ]
    plot_sweep(common.RESULTS / f"sweep_{options.task}.png", seen, seen[picked][0], "accuracy")


if __name__ == "__main__":
    main()
