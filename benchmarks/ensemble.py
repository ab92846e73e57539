"""Compares evaluating five prompts of one task together, in the same batches, with five separate evaluations.

    python benchmarks/ensemble.py                                   # trains five prompts on the shipped task first
    python benchmarks/ensemble.py --prompts A B C --data test.jsonl  # saved prompts of your own task and base

Both ways score the same encoded records with the same base. After a first, untimed pass, they are timed in turn. Prints
the time of both and the accuracies, and writes JSON.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from spt_jax import Encoder, load_base, load_prompt, make_evaluation_set, read_records
from spt_jax.evaluation.ensembles import evaluate_ensemble, score_together
from spt_jax.evaluation.evaluate import from_scores, score
from spt_jax.prompts.storage import read_prompt

ROOT = Path(__file__).resolve().parents[1]
TEST = ROOT / "spt_jax" / "assets" / "requests" / "test.jsonl"


def trained_prompts(workdir: Path, count: int, steps: int) -> list[Path]:
    """Trains prompts of the shipped task with different seeds; prompts that exist already are reused."""
    for seed in range(count):
        folder = workdir / str(seed)
        if not (folder / "results.json").exists():
            words = ["configs/quickstart.py", "--workdir", str(folder.resolve()), "--overwrite"]
            words += ["--train.steps", str(steps), "--train.seed", str(seed)]
            subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [workdir / str(seed) / "prompt" for seed in range(count)]


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, help="prompt directories of one task and base")
    parser.add_argument("--data", default=str(TEST), help="records to classify")
    parser.add_argument("--count", type=int, default=5, help="how many prompts to train if none are given")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each prompt")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each way")
    parser.add_argument("--workdir", type=Path, default=Path("out") / "ensemble", help="directory of trained prompts")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "ensemble.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folders = args.prompts or trained_prompts(args.workdir, args.count, args.steps)
    base = load_base(read_prompt(folders[0]).info["base"]["id"])
    saved = [load_prompt(folder, base) for folder in folders]
    records = read_records(args.data, split="test")
    sets = [
        make_evaluation_set(
            base, Encoder(s.template, base.tokenizer, base.config.vocab_size, base.config.max_positions), records
        )
        for s in saved
    ]
    prompts = [s.virtual for s in saved]

    def one_by_one() -> list[Any]:
        return [score(base, data, virtual) for data, virtual in zip(sets, prompts, strict=True)]

    def together() -> Any:
        return score_together(base, sets, prompts)

    single = [from_scores(sets[0], list(scores)).metrics["accuracy"] for scores in one_by_one()]
    combined = {way: evaluate_ensemble(base, sets, prompts, way).metrics["accuracy"] for way in ("mean", "vote")}
    seconds = {"one_by_one": [], "together": []}
    for _ in range(args.repeats):
        seconds["one_by_one"].append(timed(one_by_one))
        seconds["together"].append(timed(together))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "benchmark": "ensemble",
        "machine": common.machine(os.cpu_count() or 1),
        "versions": common.versions(("spt_jax", "jax", "jaxlib", "flax")),
        "commit": common.commit(),
        "records": len(records),
        "seconds": seconds,
        "ratio": medians["together"] / medians["one_by_one"],
        "accuracy": single,
        "mean_accuracy": statistics.mean(single),
        "ensemble_accuracy": combined,
    }
    common.write_json(args.out, report)
    rows = [
        [
            f"{len(prompts)} prompts, one by one",
            f"{medians['one_by_one']:.2f}",
            f"{statistics.mean(single):.3f} (mean)",
        ],
        ["together, mean", f"{medians['together']:.2f}", f"{combined['mean']:.3f}"],
        ["together, vote", f"{medians['together']:.2f}", f"{combined['vote']:.3f}"],
    ]
    print(common.table((f"{len(records)} records", "seconds", "accuracy"), rows))
    print(f"one by one: {', '.join(f'{a:.3f}' for a in single)}. Time together: {report['ratio']:.2f} of one by one")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
