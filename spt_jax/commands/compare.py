"""`spt-jax compare`: compares soft prompts with the alternatives to them."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from spt_jax.bases.base import describe_base
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.classes import class_report
from spt_jax.evaluation.inspection import NEAREST, nearest_words
from spt_jax.evaluation.predictions import predictions_jsonl
from spt_jax.experiment.command_line import Job, config_json, parse_job
from spt_jax.experiment.config import AnyMethod, resolve
from spt_jax.experiment.run import load_experiment
from spt_jax.experiment.shipped import config_path
from spt_jax.experiment.workdir import CONFIG_FILE, check_workdir, held, in_workdir, input_paths, prepare_workdir
from spt_jax.options import Pairs
from spt_jax.prompts.storage import read_prompt
from spt_jax.reports.html import write_report
from spt_jax.reports.plots import can_draw, missing_note, plot_comparison
from spt_jax.reports.report import compact_table
from spt_jax.runtime import measure
from spt_jax.runtime.files import shown, write_json, write_text
from spt_jax.runtime.provenance import provenance
from spt_jax.runtime.remote import local_copy
from spt_jax.runtime.waits import spoken
from spt_jax.studies.comparison import PREDICTIONS_FILE, Entry, ask_all, baselines, make_table, markdown, read_outside

PROGRAM = "spt-jax compare"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Job[AnyMethod]):
    """Compares soft prompts with no prompt, hand-written prompts, solved examples in context, and a linear probe.

    Attributes:
      prompts: saved soft prompts, as directories, URLs or hub ids; everything is compared with the first one.
      shots: numbers of solved training examples to put before a request; each number is one row of the comparison. Not
        used for chats of {messages}.
      shots_seed: seed for the choice of solved examples.
      probe: for classification, also evaluate a linear probe on the frozen base's features.
      others: other systems as NAME=DIRECTORY, each with predictions.jsonl in the format of this command, and facts.json
        with the numbers trainable_parameters, bytes, train_seconds, test_seconds and extra_tokens.
    """

    prefix: ClassVar[str] = "compare-"

    prompts: tuple[Path, ...] = ()
    shots: tuple[int, ...] = (4,)
    shots_seed: int = 0
    probe: bool = True
    others: Pairs = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Checks fields against each other.

        Raises:
          ConfigError: fields are invalid or missing; the message names them.
        """
        if not self.prompts:
            raise ConfigError("give the saved soft prompts to compare with --prompts, such as out/quickstart/prompt")
        if self.config.data.test is None:
            raise ConfigError("a comparison needs test records; give --data.test")
        if any(shots < 1 for shots in self.shots):
            raise ConfigError(f"--shots is {self.shots}; each number must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Runs the comparison from the command line to the table.

    Raises:
      SptError: the command line, the data or a prompt is invalid.
    """
    command = parse_job(Compare, argv, PROGRAM)
    command.validate()
    with in_workdir(command) as placed:
        run(placed, argv)


def run(command: Compare[Any], argv: Sequence[str]) -> None:
    """Runs a parsed command, whose work directory is local."""
    measure.keep_compiled_programs(command.compilation_cache)
    others = {name: local_copy(folder) for name, folder in command.others.items()}
    reads = input_paths(command.config, config_path(argv[0]), *command.prompts, *others.values())
    check_workdir(command.workdir, overwrite=command.overwrite, reads=reads)
    saved = {path: read_prompt(path) for path in command.prompts}  # before anything is loaded: a name may be wrong
    if note := missing_note("compare.png"):
        print(note)
    with spoken("loading the base and the records"):
        experiment = load_experiment(resolve(command.config))
    print(describe_base(experiment.base))
    for path, prompt in saved.items():
        if note := template_note(path, prompt.template, experiment.template):
            print(note)
    outside = [read_outside(name, folder) for name, folder in others.items()]
    options = {"shots": command.shots, "shots_seed": command.shots_seed, "probe": command.probe}
    with spoken("encoding the records"):
        rows = baselines(experiment, command.prompts, **options)
    with held(command.workdir):
        entries = [*ask_all(experiment.base, rows), *outside]
        with spoken("comparing the answers"):
            table = make_table(entries, list(experiment.template.verbalizers))
        prepare_workdir(command.workdir, overwrite=command.overwrite, reads=reads)
        words = [] if rows[0].virtual is None else nearest_words(experiment.base, rows[0].virtual, NEAREST)
        facts = {"nearest_tokens": words, "command": shlex.join([*PROGRAM.split(), *argv])}
        classes = list(experiment.template.verbalizers)
        write_results(command.workdir, entries, table, classes, config_json(command), facts)
    print(compact_table(table))
    plot = " compare.png," if can_draw() else ""
    print(f"{shown(command.workdir)}: report.html, compare.md, compare.json,{plot} predictions.jsonl")


def template_note(path: Path, own: Template, template: Template) -> str | None:
    """Returns a note if a prompt was trained with another template than that of the comparison; None if with the same.

    Args:
      path: the prompt.
      own: its template.
      template: that of the comparison, which the rows without a soft prompt have.
    """
    theirs, others = ((one.bare().prompt, one.target) for one in (own, template))
    if theirs == others or own.tasks or template.tasks:
        return None
    return (
        f"note: {shown(path)} was trained with the prompt {theirs[0]!r} and the target {theirs[1]!r}, and is asked so;"
        f" rows without a soft prompt have {others[0]!r} and {others[1]!r} of the config"
    )


def write_results(
    workdir: Path,
    entries: Sequence[Entry],
    table: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Writes compare.json, compare.md, compare.png, report.html, and predictions.jsonl.

    The table can be recomputed from predictions.jsonl.
    """
    write_json(workdir / CONFIG_FILE, settings)
    write_text(workdir / PREDICTIONS_FILE, predictions_jsonl({entry.name: entry.predictions for entry in entries}))
    write_json(
        workdir / "compare.json",
        {
            "table": table,
            "classes": {entry.name: class_report(entry.predictions, classes) for entry in entries} if classes else {},
            "device": measure.device_name(),
            "versions": measure.versions(),
            **facts,
            **provenance(),
        },
    )
    write_text(workdir / "compare.md", markdown(table) + "\n")
    if can_draw():
        plot_comparison(workdir / "compare.png", table, title=workdir.name)
    write_report(workdir)
