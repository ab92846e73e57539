"""Trains every method with its defaults on the same data, base and number of steps.

    python benchmarks/family.py --task starter                     # the model and task that ship with the package
    python benchmarks/family.py --task trec --seeds 0 1 2          # stories260K and TREC, from the folder of real data
    python benchmarks/family.py --task trec --methods prompt_tuning prefix_tuning --steps 300

Each run is `train.py` in a separate process. Runs that the work directory already contains are not repeated, so an
interrupted benchmark can be resumed. Prints a table and writes JSON and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from spt_jax.prompts import METHODS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def _local(name: str, verbalizers: Sequence[str]) -> list[str]:
    """Returns the options of a task from the folder of real data, for stories260K."""
    files = {split: str(SHARED / "data" / name / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return [
        "configs/local_files.py",
        *("--base.path", str(SHARED / "models" / "stories260K")),
        *(word for split, file in files.items() for word in (f"--data.{split}", file)),
        *("--data.prompt", "<soft>{text}\\n", "--data.target", "{label}"),
        *("--data.verbalizers", *verbalizers),
    ]


TASKS = {
    "starter": ["configs/quickstart.py"],
    "trec": _local("trec", ("person=H", "location=L", "number=N", "entity=E", "description=D", "abbreviation=A")),
    "sms_spam": _local("sms_spam", ("ham=H", "spam=S")),
}
# Without methods that need several tasks, recurrent layers, or tokens chosen for the task.
_OTHERS = ("multitask_prompt_tuning", "progressive_prompts", "state_tuning", "trained_tokens")
SINGLE_TASK = [name for name in METHODS if name not in _OTHERS]
STEPS = {"starter": 600, "trec": 1200, "sms_spam": 1200}


def run(task: str, method: str, seed: int, steps: int, workdir: Path) -> dict[str, Any]:
    """Returns the results of one run, read from its work directory if they exist.

    Raises:
      SystemExit: the run failed; the end of its error output is shown.
    """
    folder = workdir / f"{task}-{method}-{steps}-{seed}"
    file = folder / "results.json"
    if not file.exists():
        words = [sys.executable, "train.py", *TASKS[task], "--workdir", str(folder.resolve()), "--overwrite"]
        words += ["--method.name", method, "--train.steps", str(steps), "--train.seed", str(seed)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{method}, seed {seed}: {done.stderr[-2000:]}")
    return json.loads(file.read_text())


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the test accuracy over the seeds, and the parameters, bytes and training time of one prompt."""
    soft = [run["test"]["soft_prompt"] for run in runs]
    return {
        "accuracy": [metrics["accuracy"] for metrics in soft],
        "accuracy_interval": [metrics["accuracy_interval"] for metrics in soft],
        "mean_accuracy": float(np.mean([metrics["accuracy"] for metrics in soft])),
        "trainable_parameters": runs[0]["trainable_parameters"],
        "prompt_bytes": runs[0]["prompt_bytes"],
        "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
    }


def plot(path: Path, task: str, by_method: dict[str, dict[str, Any]]) -> None:
    """Plots the accuracy of every seed by method, with the bytes of a saved prompt."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(by_method) + 1.4), layout="constrained")
    ordered = sorted(by_method, key=lambda method: by_method[method]["mean_accuracy"])
    for place, method in enumerate(ordered):
        figures = by_method[method]
        axes.plot(figures["accuracy"], [place] * len(figures["accuracy"]), "o", color="#7fa3c7", markersize=5)
        axes.plot(figures["mean_accuracy"], place, "|", color="#1f4e79", markersize=16, markeredgewidth=2.5)
    labels = [f"{method}  {by_method[method]['prompt_bytes'] / 1000:.0f} KB" for method in ordered]
    axes.set_yticks(range(len(ordered)), labels)
    axes.set_xlabel(f"test accuracy on {task}: seeds (dots) and their mean")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="starter")
    parser.add_argument("--methods", nargs="+", choices=SINGLE_TASK, default=SINGLE_TASK)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: 600 for the starter, 1,200 for the others")
    parser.add_argument("--workdir", type=Path, default=Path("out") / "family", help="where the runs are stored")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/family_<task>.json here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    steps = args.steps or STEPS[args.task]
    by_method = {}
    for method in args.methods:
        by_method[method] = summary([run(args.task, method, seed, steps, args.workdir) for seed in args.seeds])
        print(f"{method}: {by_method[method]['mean_accuracy']:.3f}", file=sys.stderr)
    report = {
        "benchmark": "family",
        "task": args.task,
        "steps": steps,
        "seeds": args.seeds,
        "machine": common.machine(os.cpu_count() or 1),
        "versions": common.versions(("spt_jax", "jax", "jaxlib", "flax", "optax")),
        "commit": common.commit(),
        "methods": by_method,
    }
    out = args.out or common.RESULTS / f"family_{args.task}.json"
    common.write_json(out, report)
    plot(out.with_suffix(".png"), args.task, by_method)
    rows = [
        [
            method,
            f"{figures['mean_accuracy']:.3f}",
            " ".join(f"{accuracy:.3f}" for accuracy in figures["accuracy"]),
            "[{:.3f}, {:.3f}]".format(*figures["accuracy_interval"][0]),
            f"{figures['trainable_parameters']:,}",
            f"{figures['prompt_bytes']:,}",
            f"{figures['train_seconds']:.0f}",
        ]
        for method, figures in sorted(by_method.items(), key=lambda item: -item[1]["mean_accuracy"])
    ]
    header = ("method", "mean", "by seed", "95 % interval, first seed", "trained parameters", "bytes saved", "seconds")
    print(common.table(header, rows))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
