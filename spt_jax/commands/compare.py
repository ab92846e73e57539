"""`python -m spt_jax compare`: soft prompts against everything that one might do instead."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from spt_jax.bases.base import describe_base
from spt_jax.errors import ConfigError
from spt_jax.evaluation.predictions import predictions_jsonl
from spt_jax.experiment.command_line import Job, config_json, parse_job
from spt_jax.experiment.config import AnyMethod, resolve
from spt_jax.experiment.run import load_experiment
from spt_jax.experiment.workdir import CONFIG_FILE, check_workdir, held, input_paths, prepare_workdir
from spt_jax.options import Pairs
from spt_jax.reports.plots import plot_comparison
from spt_jax.runtime import measure
from spt_jax.runtime.files import write_json, write_text
from spt_jax.studies.comparison import PREDICTIONS_FILE, Entry, ask, baselines, make_table, markdown, read_outside

PROGRAM = "python -m spt_jax compare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Job[AnyMethod]):
    """Compares soft prompts with no prompt, hand-written prompts, solved examples in context, and a linear probe.

    Attributes:
      prompts: directories of saved soft prompts; the first is what all others are compared with.
      shots: numbers of solved training examples to put in front of a request; each is a way of asking, but for chats of
        {messages}.
      shots_seed: of their choice.
      probe: for classes, also a linear probe on the frozen base's features.
      others: NAME=DIRECTORY of systems outside, each with predictions.jsonl as this command writes it, and facts.json:
        the numbers trainable_parameters, bytes, train_seconds, test_seconds and extra_tokens.
    """

    prefix: ClassVar[str] = "compare-"

    prompts: tuple[Path, ...] = ()
    shots: tuple[int, ...] = (4,)
    shots_seed: int = 0
    probe: bool = True
    others: Pairs = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Checks what no field can say by itself.

        Raises:
          ConfigError: naming the fields.
        """
        if not self.prompts:
            raise ConfigError("--prompts names the saved soft prompt to compare, such as out/quickstart/prompt")
        if self.config.data.test is None:
            raise ConfigError("a comparison is made on test records; give --data.test")
        if any(shots < 1 for shots in self.shots):
            raise ConfigError(f"--shots are {self.shots}; each is 1 or more")


def main(argv: Sequence[str]) -> None:
    """The whole comparison, from words to table.

    Raises:
      SptError: as the words, the data and the prompts have it.
    """
    command = parse_job(Compare, argv, PROGRAM)
    command.validate()
    measure.keep_compiled_programs(command.compilation_cache)
    others = {name: Path(folder) for name, folder in command.others.items()}
    reads = input_paths(command.config, Path(argv[0]), *command.prompts, *others.values())
    check_workdir(command.workdir, overwrite=command.overwrite, reads=reads)
    experiment = load_experiment(resolve(command.config))
    print(describe_base(experiment.base))
    outside = [read_outside(name, folder) for name, folder in others.items()]
    options = {"shots": command.shots, "shots_seed": command.shots_seed, "probe": command.probe}
    every = baselines(experiment, command.prompts, **options)
    with held(command.workdir):
        entries = [*(ask(experiment.base, way) for way in every), *outside]
        table = make_table(entries, list(experiment.template.verbalizers))
        prepare_workdir(command.workdir, overwrite=command.overwrite, reads=reads)
        write_results(command.workdir, entries, table, config_json(command), argv)
    print(markdown(table))
    print(f"{command.workdir}: compare.md, compare.json, compare.png, predictions.jsonl")


def write_results(
    workdir: Path,
    entries: Sequence[Entry],
    table: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    argv: Sequence[str],
) -> None:
    """compare.json, compare.md, compare.png, and predictions.jsonl, from which all of it can be computed again."""
    write_json(workdir / CONFIG_FILE, settings)
    write_text(workdir / PREDICTIONS_FILE, predictions_jsonl({entry.name: entry.predictions for entry in entries}))
    write_json(
        workdir / "compare.json",
        {
            "table": table,
            "device": measure.device_name(),
            "versions": measure.versions(),
            "command": shlex.join([*PROGRAM.split(), *argv]),
        },
    )
    write_text(workdir / "compare.md", markdown(table) + "\n")
    plot_comparison(workdir / "compare.png", table)
