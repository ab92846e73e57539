"""`spt-jax find-rate`: suggests a learning rate for a config with a range test."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from spt_jax.bases.base import describe_base
from spt_jax.experiment.command_line import Job, config_json, parse_job
from spt_jax.experiment.config import AnyMethod, resolve
from spt_jax.experiment.run import load_experiment
from spt_jax.experiment.shipped import config_path
from spt_jax.experiment.workdir import CONFIG_FILE, check_workdir, held, in_workdir, input_paths, prepare_workdir
from spt_jax.reports.plots import can_draw, missing_note, plot_range_test
from spt_jax.runtime import measure
from spt_jax.runtime.files import shown, write_json
from spt_jax.runtime.progress import Progress
from spt_jax.runtime.waits import spoken
from spt_jax.training.population import Member
from spt_jax.training.rate_finder import range_test

PROGRAM = "spt-jax find-rate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindRate(Job[AnyMethod]):
    """Trains once with a learning rate that increases at each step, and suggests a learning rate.

    Attributes:
      low: the first rate.
      high: the last rate.
      rates: number of steps, each with its own rate.
    """

    prefix: ClassVar[str] = "rate-"

    low: float = 1e-4
    high: float = 10.0
    rates: int = 100


def main(argv: Sequence[str]) -> None:
    """Runs the range test from the command line to the suggestion.

    Raises:
      SptError: the command line, the data or the base is invalid.
    """
    command = parse_job(FindRate, argv, PROGRAM)
    with in_workdir(command) as placed:
        run(placed, argv)


def run(command: FindRate[Any], argv: Sequence[str]) -> None:
    """Runs a parsed command, whose work directory is local."""
    measure.keep_compiled_programs(command.compilation_cache)
    workdir, reads = command.workdir, input_paths(command.config, config_path(argv[0]))
    check_workdir(workdir, overwrite=command.overwrite, reads=reads)
    if note := missing_note("rates.png"):
        print(note)
    with spoken("loading the base and the records"):
        experiment = load_experiment(resolve(command.config))
    with spoken("encoding the training records"):
        examples, plan = experiment.training_set()
    experiment, _ = experiment.fitted(plan)
    config, base = experiment.config, experiment.base
    print(describe_base(base))
    with held(workdir), Progress("training", command.rates, unit="step") as progress:
        found = range_test(
            base,
            Member(config.method, examples, plan, config.train.seed, 0.0, config.loss.class_weights or None),
            config.optimizer,
            experiment.objective(plan),
            batch_size=config.train.batch_size,
            microbatches=config.train.microbatches,
            low=command.low,
            high=command.high,
            steps=command.rates,
            progress=lambda step: progress.advance(),
        )
        prepare_workdir(workdir, overwrite=command.overwrite, reads=reads)
        write_json(workdir / CONFIG_FILE, config_json(command))
        write_json(
            workdir / "rates.json",
            {
                "suggested": found.suggested,
                "rates": found.rates.tolist(),
                "losses": found.losses.tolist(),
                "smoothed": found.smoothed.tolist(),
                "command": shlex.join([*PROGRAM.split(), *argv]),
            },
        )
        if can_draw():
            plot_range_test(workdir / "rates.png", found.rates, found.losses, found.smoothed, found.suggested)
    optimizer = experiment.config.optimizer
    now = f"{optimizer.name} has {optimizer.learning_rate} in this config"
    print(f"suggested: --optimizer.learning-rate {found.suggested:.2g}; {now}")
    print(f"{shown(workdir)}: rates.json{', rates.png' if can_draw() else ''}")
