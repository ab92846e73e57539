"""`spt-jax sweep`: trains prompts with many settings on one frozen base, and reports the best.

Trials of one setting differ only in the seed. Prompt lengths are tried in ascending order until validation stops
improving, by the rules of `plateau`.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from spt_jax.bases.base import describe_base
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.evaluation import metrics
from spt_jax.experiment.command_line import Job, config_json, first_command, parse_job
from spt_jax.experiment.config import AnyMethod, ExperimentConfig, resolve
from spt_jax.experiment.run import distillation_of, input_digests
from spt_jax.experiment.shared_studies import FOLDER
from spt_jax.experiment.shipped import config_path
from spt_jax.experiment.workdir import check_workdir, held, in_workdir, input_paths, open_workdir
from spt_jax.reports.html import write_report
from spt_jax.reports.plots import can_draw, missing_note, plot_sweep
from spt_jax.runtime import measure, signals
from spt_jax.runtime.files import shown, write_json
from spt_jax.runtime.progress import Progress
from spt_jax.runtime.provenance import provenance
from spt_jax.runtime.waits import spoken
from spt_jax.studies.plateau import Estimate, check_records, has_plateaued, shortest_of_the_best
from spt_jax.studies.results import (
    LENGTH,
    Score,
    ask_together,
    by_length,
    check_comparable,
    check_ensemble,
    chosen_details,
    copy_prompt,
    finished,
    scored,
    trial_score,
    validation_mean,
)
from spt_jax.studies.settings import check_method, flag_words, named, parse_field, settings
from spt_jax.studies.trials import (
    Preparation,
    Row,
    Trial,
    populations,
    read_rows,
    train_population,
    trial_folder,
    trial_numbers,
    write_rows,
)
from spt_jax.training.halving import Halving
from spt_jax.training.logs import check_log

PROGRAM = "spt-jax sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Job[AnyMethod]):
    """Trains prompts with many settings on one frozen base, and reports the best.

    Attributes:
      resume: resume the sweep in workdir.
      lengths: prompt lengths, tried in ascending order until validation stops improving.
      seeds: each setting is trained once with each seed.
      over: config fields to vary: FIELD=VALUE,VALUE,... in all combinations. With --trials, settings are drawn from
        these values, or from FIELD=LOW..HIGH or FIELD=LOW..HIGH:log.
      trials: number of settings to draw.
      draws_seed: seed for drawing settings.
      patience: a sweep over lengths stops after this number of lengths in a row without an improvement; 0 tries all.
      resolution: the smallest difference in accuracy that matters in a sweep over lengths.
      halving: stop the worse half of the trials that train together after an eighth, a quarter and a half of the steps.
      ensemble: number of the best trials to evaluate as an ensemble at the end.
    """

    prefix: ClassVar[str] = "sweep-"

    resume: bool = False
    lengths: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    over: tuple[str, ...] = ()
    trials: int | None = None
    draws_seed: int = 0
    patience: int = 2
    resolution: float = 0.05
    halving: bool = False
    ensemble: int = 0

    def validate(self) -> None:
        """Checks fields against each other.

        Raises:
          ConfigError: fields are invalid or missing; the message names them.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {self.seeds or 'empty'}; give at least one seed, and each seed only once")
        if list(self.lengths) != sorted(set(self.lengths)) or any(length < 1 for length in self.lengths):
            raise ConfigError(f"--lengths is {self.lengths}; lengths must be ascending and at least 1")
        for name in ("patience", "ensemble", "draws_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0")
        if self.halving and self.lengths:
            raise ConfigError(
                "--halving is not compatible with --lengths: lengths are compared by trials that run to the end"
            )
        if not _validates(self.config):
            raise ConfigError("a sweep compares trials by validation; give --data.validation")


def _validates(config: ExperimentConfig[Any]) -> bool:
    """Whether a run has validation records."""
    distillation = distillation_of(config)
    return config.data.validation is not None or (distillation is not None and bool(distillation.study_validation))


def main(argv: Sequence[str]) -> None:
    """Runs the sweep from the command line to the results.

    Raises:
      SptError: the command line, the data or the base is invalid.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    command = parse_job(Sweep, argv, PROGRAM)
    command.validate()
    with in_workdir(command) as placed:
        run(placed, argv)


def run(command: Sweep[Any], argv: Sequence[str]) -> None:
    """Runs a parsed command, whose work directory is local."""
    measure.keep_compiled_programs(command.compilation_cache)
    workdir, words = command.workdir, shlex.join([*PROGRAM.split(), *argv])
    mode, config_file = {"resume": command.resume, "overwrite": command.overwrite}, config_path(argv[0])
    check_workdir(workdir, **mode, reads=input_paths(command.config, config_file))
    check_log(command.config.log)
    if note := missing_note("sweep.png"):
        print(note)
    stages, prepare = plan_stages(command, argv), Preparation(workdir / FOLDER if command.resume else None)
    planned = {trial.number: trial for stage in stages for trial in stage}
    if command.ensemble > len(planned):
        raise ConfigError(f"--ensemble is {command.ensemble}; there are {len(planned)} trials")
    # Prepares the longest prompts first, to fail before training if they do not fit.
    with spoken("preparing the trials"):
        all_prepared = [prepare(trial) for trial in reversed(planned.values())]
    check_comparable([*reversed(planned.values())], all_prepared)
    tested = [prepared.asked["test"] for prepared in all_prepared if "test" in prepared.asked]
    if any(asked.prompts for asked in tested) and (note := metrics.missing_note()):
        print(note)
    if command.ensemble:
        check_ensemble(all_prepared)
    for prepared in all_prepared:
        if command.lengths and prepared.experiment.template.verbalizers:
            check_records(len(prepared.asked["validation"].examples), command.resolution)
        elif command.lengths and len(prepared.asked["validation"].examples) < 2:
            raise ConfigError("a sweep over lengths needs at least 2 validation records to estimate the noise")
    validated = [list(prepared.asked["validation"].records) for prepared in all_prepared]
    if any(records != validated[0] for records in validated):
        print("note: trials have different validation sets, and are compared by them anyway")
    excluded = ("config", "workdir", "resume", "overwrite", "compilation_cache")
    options = {name: value for name, value in config_json(command).items() if name not in excluded}
    examples = [
        (
            prepared.experiment,
            {"train": prepared.examples, **{split: asked.examples for split, asked in prepared.asked.items()}},
        )
        for prepared in all_prepared
    ]
    reads = [path for trial in planned.values() for path in input_paths(trial.config, config_file)]
    facts = {"command": first_command([*PROGRAM.split(), *argv])}
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(workdir))
        stack.enter_context(signals.advising("Continue with --resume"))
        settings = {**config_json(command.config), "sweep": options}
        digests = input_digests(examples)
        open_workdir(workdir, settings, digests, **mode, reads=reads)
        prepare.studies.write(workdir / FOLDER)
        rows = read_rows(workdir, planned)
        for described in dict.fromkeys(describe_base(prepared.experiment.base) for prepared in all_prepared):
            print(described)
        print(f"{len(planned)} trials, {len(rows)} of them done; seeds {', '.join(map(str, command.seeds))}")
        halving = Halving() if command.halving else None
        ran: list[Trial] = []
        scores: list[Score] = []
        progress = stack.enter_context(Progress("sweep", len(planned), len(rows)))
        for stage in stages:
            for population in populations(stage, prepare):
                left = sum(trial.number not in rows for trial in population)
                if left:
                    progress.begin(trial_numbers(population))
                    for row in train_population(population, prepare, workdir, halving=halving, facts=facts):
                        rows[row["trial"]] = row
                    write_rows(workdir, planned, rows)
                    progress.advance(left)
            ran += stage
            scores = scored(workdir, rows, ran)
            for score in scores:
                if score.trials[0] >= stage[0].number:
                    test = "" if score.test is None else f"   test {_shown(score.test)}"
                    print(f"{named(score.settings):40} validation {_shown(score.validation)}{test}")
            tried = [score.validation for score in by_length(scores)] if command.lengths else []
            if command.patience and tried and has_plateaued(tried, command.patience):
                break
        progress.close()
        with spoken("writing the results"):
            results = finish(command, prepare, ran, rows, scores)
        write_json(
            workdir / "results.json",
            {
                **results,
                "steps_of_all": sum(trial.config.train.steps for trial in planned.values()),
                "device": measure.device_name(),
                "versions": measure.versions(),
                "data": digests["data"],
                "command": words,
                **provenance(),
            },
        )
        write_report(workdir)
        plot = "report.html, sweep.png, " if can_draw() else "report.html, "
        print(f"{shown(workdir)}: trials.csv, trials.parquet, results.json, {plot}and each trial's prompt in trials/")


def plan_stages(command: Sweep[Any], argv: Sequence[str]) -> list[list[Trial]]:
    """Returns all trials, one stage per length in the order of trying; without lengths, all in one stage.

    Raises:
      ConfigError: a field or value is invalid, or a field has its own option.
    """
    fields = [parse_field(text, command.config) for text in command.over]
    for name, _ in fields:
        if name == "train.seed" or (name == LENGTH and command.lengths):
            raise ConfigError(f"--over {name}: use --{'seeds' if name == 'train.seed' else 'lengths'} instead")
    drawn = settings(fields, command.trials, command.draws_seed)
    stages: list[list[Trial]] = []
    for length in command.lengths or (None,):
        stage = []
        for one in drawn:
            setting = one if length is None else {LENGTH: str(length), **one}
            words = [word for name, value in setting.items() for word in flag_words(name, value, command.config)]
            check_method(setting, argv)
            config = resolve(parse_job(Sweep, [*argv, *words], PROGRAM).config)
            if not _validates(config):
                raise ConfigError(f"a sweep compares trials by validation, and {named(setting)} leaves none")
            for seed in command.seeds:
                number = len(stages) * len(drawn) * len(command.seeds) + len(stage) + 1
                seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
                stage.append(Trial(number, setting, seeded))
        stages.append(stage)
    return stages


def finish(
    command: Sweep[Any],
    prepare: Preparation,
    ran: Sequence[Trial],
    rows: dict[int, Row],
    scores: Sequence[Score],
) -> dict[str, Any]:
    """Chooses a setting, saves its best prompt as `prompt/`, draws `sweep.png`, and evaluates the ensemble.

    The plot also shows the trials that were stopped early.

    Returns:
      The contents of `results.json`.

    Raises:
      TrainingError: no trial finished.
    """
    workdir = command.workdir
    if not scores:
        raise TrainingError(f"no trial finished; see the status column of {workdir}/trials.csv")
    best = max(scores, key=lambda score: score.validation.mean)
    chosen, reason = best, "the highest mean on validation"
    if len(best.trials) < len(command.seeds):
        reason += " of the trials that finished; no setting has finished with all seeds"
    if command.lengths:
        lengths = by_length(scores)
        chosen = lengths[shortest_of_the_best([score.validation for score in lengths])]
        reason = f"the shortest within one standard error of the best, {named(best.settings)}"
    number = max(chosen.trials, key=lambda trial: trial_score(rows[trial]))
    copy_prompt(trial_folder(workdir, number) / "prompt", workdir / "prompt")
    print(f"chosen: {named(chosen.settings)}, {reason}; {shown(workdir)}/prompt is from trial {number}")
    plotted = {trial for score in scores for trial in score.trials}
    others = [
        (trial.settings, value)
        for trial in ran
        if trial.number not in plotted and (value := validation_mean(workdir, trial.number, chosen.measure)) is not None
    ]
    if can_draw():
        plot_sweep(
            workdir / "sweep.png",
            [(score.settings, score.validation, score.by_seed) for score in scores],
            chosen.settings,
            chosen.measure.replace("_", " "),
            title=f"{workdir.name}: trial {number}, step {rows[number]['best_step']}",
            others=others,
        )
    unfinished = {trial.number: rows[trial.number]["status"] for trial in ran if not finished(rows[trial.number])}
    if unfinished:
        print("not finished: " + "; ".join(f"trial {number}, {status}" for number, status in unfinished.items()))
    together = ask_together(command.ensemble, prepare, ran, rows, workdir) if command.ensemble else None
    if together is not None:
        print(
            f"ensemble of the best {len(together['trials'])}: {together['split']} accuracy {together['accuracy']:.3f};"
            f" separately {together['mean_accuracy']:.3f} on average"
        )
    experiment = prepare(next(trial for trial in ran if trial.number == number)).experiment
    return {
        "measure": chosen.measure,
        "settings": [score.as_json() for score in scores],
        "chosen": {**chosen.as_json(), "trial": number, "reason": reason},
        "ensemble": together,
        "not_to_their_end": unfinished,
        "trials": len(ran),
        "steps": sum(rows[trial.number]["steps"] for trial in ran),
        **chosen_details(workdir, number, experiment),
    }


def _shown(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.mean:.3f} [{low:.3f}, {high:.3f}]"
