"""Measures thirty-two prompts as one population against thirty-two runs, and the savings of successive halving.

    python benchmarks/population.py             # about 15 minutes on two idle cores

Prompt tuning of stories260K on TREC, with members of several seeds and learning rates. First, 50 steps: the population
in one process, and every member in a separate process, start-up and compilation included; each member's losses must
equal those of its separate run. Then a longer run with validation, once without and once with halving. Writes JSON.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RATES = (0.02, 0.05, 0.1, 0.2)
TOLERANCE = 1e-4
PACKAGES = ("spt_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def train(numbers: Sequence[int], steps: int, halved: bool, validated: bool, workdir: Path) -> dict[str, Any]:
    """Trains the members with these numbers as one population; returns their losses and final states."""
    from spt_jax.evaluation.evaluate import evaluate
    from spt_jax.experiment.command_line import parse_train
    from spt_jax.experiment.comparison import evaluation_sets
    from spt_jax.experiment.config import resolve
    from spt_jax.experiment.run import load_experiment
    from spt_jax.training.halving import Halving, fit_population
    from spt_jax.training.logs import NoLog
    from spt_jax.training.population import Member

    data = SHARED / "data" / "trec"
    flags = {
        "--base.path": SHARED / "models" / "stories260K",
        "--data.train": data / "train.jsonl",
        "--data.validation": data / "validation.jsonl",
        "--data.prompt": r"<soft>{text}\n",
        "--data.target": "{label}",
        "--train.steps": steps,
        "--train.evaluate-every": max(1, steps // 8) if validated else steps,
        "--train.checkpoint-every": steps,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    verbalizers = ["person=H", "location=L", "number=N", "entity=E", "description=D", "abbreviation=A"]
    command = parse_train([str(ROOT / "configs" / "local_files.py"), *words, "--data.verbalizers", *verbalizers])
    experiment = load_experiment(resolve(command.config))
    config, base = experiment.config, experiment.base
    examples, plan = experiment.training_set()
    members = [Member(config.method, examples, plan, n, RATES[n % len(RATES)]) for n in numbers]
    asked = evaluation_sets(experiment)["validation"].soft if validated else None
    losses: dict[str, list[float]] = {}

    class Losses(NoLog):
        def write(self, step: int, values: Any) -> None:
            for member, loss in values.get("loss", {}).items():
                losses.setdefault(member, []).append(loss)

    def validate(number: int, params: Any) -> dict[str, Any]:
        if asked is None:
            return {"loss": 0.0}
        return evaluate(base, asked, config.method.materialize(params, base.model)).metrics

    standings = fit_population(
        base,
        members,
        config.optimizer,
        experiment.objective(plan),
        config.train,
        workdir=workdir,
        log=lambda step: Losses(),
        validate=validate,
        halving=Halving() if halved else None,
    )
    return {
        "losses": list(losses.values()),
        "members": [
            {"seed": m.seed, "rate": m.learning_rate, "steps": s.steps, "ended": s.ended, "best": s.best.metrics}
            for m, s in zip(members, standings, strict=True)
        ],
    }


def measured(numbers: Sequence[int], steps: int, *flags: str) -> dict[str, Any]:
    """Runs `train` in a separate process; returns its results and the seconds from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = ["--worker", str(result), "--numbers", *map(str, numbers), "--steps", str(steps), *flags]
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, *words], check=True, stderr=subprocess.DEVNULL)
        return {"seconds": time.perf_counter() - start, **json.loads(result.read_text())}


def against_runs(count: int, steps: int) -> dict[str, Any]:
    """Compares the population with a separate run of each member.

    Raises:
      SystemExit: a member's losses differ from those of its separate run.
    """
    together = measured(range(count), steps)
    separate = [measured([number], steps) for number in range(count)]
    worst = 0.0
    for ours, own in zip(together["losses"], separate, strict=True):
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, own["losses"][0], strict=True)))
    if not worst <= TOLERANCE:
        raise SystemExit(f"a member's losses differ from those of its separate run by {worst}")
    seconds = sum(own["seconds"] for own in separate)
    return {
        "members": count,
        "steps": steps,
        "population_seconds": together["seconds"],
        "runs_seconds": seconds,
        "ratio": together["seconds"] / seconds,
        "largest_loss_difference": worst,
    }


def with_halving(count: int, steps: int) -> dict[str, Any]:
    """Compares the best member's validation accuracy and the number of steps with and without halving."""
    whole, halved = (measured(range(count), steps, "--validated", *more) for more in ((), ("--halved",)))

    def best(found: dict[str, Any]) -> dict[str, Any]:
        return max(found["members"], key=lambda member: member["best"]["accuracy"])

    first, second = best(whole), best(halved)
    accuracy, examples = first["best"]["accuracy"], first["best"]["examples"]
    taken = [sum(member["steps"] for member in found["members"]) for found in (whole, halved)]
    return {
        "members": count,
        "steps": steps,
        "whole": {"seconds": whole["seconds"], "steps": taken[0], "best": first},
        "halved": {"seconds": halved["seconds"], "steps": taken[1], "best": second},
        "share_of_steps": taken[1] / taken[0],
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / examples),
        "lost_accuracy": accuracy - second["best"]["accuracy"],
        "all": {"whole": whole["members"], "halved": halved["members"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="steps of the comparison with separate runs")
    parser.add_argument("--longer", type=int, default=240, help="steps of the run with halving")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/population_<machine>.json here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--halved", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--validated", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        os.environ["JAX_PLATFORMS"] = "cpu"
        common.use_cores(2)
        with tempfile.TemporaryDirectory() as folder:
            found = train(options.numbers, options.steps, options.halved, options.validated, Path(folder))
        common.write_json(options.worker, found)
        return
    runs = against_runs(options.members, options.steps)
    print(
        f"{runs['members']} members, {runs['steps']} steps: {runs['population_seconds']:.0f} s together,"
        f" {runs['runs_seconds']:.0f} s as separate runs, ratio {runs['ratio']:.2f};"
        f" losses differ by {runs['largest_loss_difference']:.0e}"
    )
    race = with_halving(options.members, options.longer)
    print(
        f"halving over {race['steps']} steps: {race['share_of_steps']:.2f} of the steps, best accuracy"
        f" {race['halved']['best']['best']['accuracy']:.3f} against {race['whole']['best']['best']['accuracy']:.3f}"
        f" (standard error {race['standard_error']:.3f})"
    )
    report = {
        "benchmark": "population",
        "machine": common.machine(2),
        "versions": common.versions(PACKAGES),
        "commit": common.commit(),
        "runs": runs,
        "halving": race,
    }
    out = options.out or common.RESULTS / f"population_{common.machine_name(2)}.json"
    common.write_json(out, report)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
