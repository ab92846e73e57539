"""`python -m spt_jax sweep`: trains prompts of many settings on one frozen base, and says which are the best.

Trials of one setting differ in their seed alone. Prompt lengths are tried from the shortest up, until validation stops
improving, by the rules of `plateau`.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from spt_jax.bases.base import describe_base
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.experiment.command_line import Job, config_json, first_command, parse_job
from spt_jax.experiment.config import AnyMethod, resolve
from spt_jax.experiment.run import input_digests
from spt_jax.experiment.workdir import check_workdir, held, input_paths, open_workdir
from spt_jax.reports.plots import plot_sweep
from spt_jax.runtime import measure, signals
from spt_jax.runtime.files import write_json
from spt_jax.studies.plateau import Estimate, check_records, has_plateaued, shortest_of_the_best
from spt_jax.studies.results import (
    LENGTH,
    Score,
    ask_together,
    by_length,
    check_ensemble,
    copy_prompt,
    finished,
    scored,
    trial_score,
)
from spt_jax.studies.settings import flag_words, named, parse_field, settings
from spt_jax.studies.trials import (
    Preparation,
    Row,
    Trial,
    populations,
    read_rows,
    train_population,
    trial_folder,
    write_rows,
)
from spt_jax.training.halving import Halving

PROGRAM = "python -m spt_jax sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Job[AnyMethod]):
    """Trains prompts of many settings on one frozen base, and says which are the best.

    Attributes:
      resume: go on with the sweep in workdir.
      lengths: prompt lengths, tried from the shortest up until validation stops improving.
      seeds: every setting is trained once with each.
      over: config fields to vary, FIELD=VALUE,VALUE,... in all combinations. With --trials, drawn from such values, or
        from FIELD=LOW..HIGH or FIELD=LOW..HIGH:log.
      trials: draw so many settings.
      draws_seed: of these draws.
      patience: a sweep over lengths stops after so many in a row without an improvement; 0 tries them all.
      resolution: the smallest difference in accuracy that matters in a sweep over lengths.
      halving: after an eighth, a quarter and a half of the steps, the worse half of the trials that train together
        stops.
      ensemble: ask so many of the best trials together in the end.
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
        """Checks what no field can say by itself.

        Raises:
          ConfigError: naming the fields.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds are {self.seeds or 'none'}; a sweep trains with at least one, and each once")
        if list(self.lengths) != sorted(set(self.lengths)) or any(length < 1 for length in self.lengths):
            raise ConfigError(f"--lengths are {self.lengths}; they go up, from 1 or more")
        for name in ("patience", "ensemble", "draws_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it is 0 or more")
        if self.halving and self.lengths:
            raise ConfigError("--halving ends trials early, and --lengths compares trials at their end; give one")
        if self.config.data.validation is None:
            raise ConfigError("a sweep chooses by validation; give --data.validation")


def main(argv: Sequence[str]) -> None:
    """The whole sweep, from words to results.

    Raises:
      SptError: as the words, the data and the base have it.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    command = parse_job(Sweep, argv, PROGRAM)
    command.validate()
    measure.keep_compiled_programs(command.compilation_cache)
    workdir, words = command.workdir, shlex.join([*PROGRAM.split(), *argv])
    way, config_file = {"resume": command.resume, "overwrite": command.overwrite}, Path(argv[0])
    check_workdir(workdir, **way, reads=input_paths(command.config, config_file))
    stages, prepare = plan_stages(command, argv), Preparation()
    planned = {trial.number: trial for stage in stages for trial in stage}
    if command.ensemble > len(planned):
        raise ConfigError(f"--ensemble is {command.ensemble}; there are {len(planned)} trials")
    # What does not fit, the longest first, is known before anything is trained.
    every = [prepare(trial) for trial in reversed(planned.values())]
    if command.ensemble:
        check_ensemble(every)
    for prepared in every:
        if command.lengths and prepared.experiment.template.verbalizers:
            check_records(len(prepared.asked["validation"].examples), command.resolution)
        elif command.lengths and len(prepared.asked["validation"].examples) < 2:
            raise ConfigError("a sweep over lengths sees no noise in 1 validation record; 2 are the least")
    validated = [list(prepared.asked["validation"].records) for prepared in every]
    if any(records != validated[0] for records in validated):
        print("trials have validation sets of their own, by which they are compared all the same")
    elsewhere = ("config", "workdir", "resume", "overwrite", "compilation_cache")
    options = {name: value for name, value in config_json(command).items() if name not in elsewhere}
    examples = [
        (own.experiment, {"train": own.examples, **{split: asked.examples for split, asked in own.asked.items()}})
        for own in every
    ]
    reads = [path for trial in planned.values() for path in input_paths(trial.config, config_file)]
    facts = {"command": first_command([*PROGRAM.split(), *argv])}
    with held(workdir), signals.advising("Go on with --resume"):
        settings = {**config_json(command.config), "sweep": options}
        open_workdir(workdir, settings, input_digests(examples), **way, reads=reads)
        rows = read_rows(workdir, planned)
        for described in dict.fromkeys(describe_base(prepared.experiment.base) for prepared in every):
            print(described)
        print(f"{len(planned)} trials, {len(rows)} of them done; seeds {', '.join(map(str, command.seeds))}")
        halving = Halving() if command.halving else None
        ran: list[Trial] = []
        scores: list[Score] = []
        for stage in stages:
            for population in populations(stage, prepare):
                if any(trial.number not in rows for trial in population):
                    for row in train_population(population, prepare, workdir, halving=halving, facts=facts):
                        rows[row["trial"]] = row
                    write_rows(workdir, planned, rows)
            ran += stage
            scores = scored(workdir, rows, ran)
            for score in scores:
                if score.trials[0] >= stage[0].number:
                    test = "" if score.test is None else f"   test {_shown(score.test)}"
                    print(f"{named(score.settings):40} validation {_shown(score.validation)}{test}")
            walked = [score.validation for score in by_length(scores)] if command.lengths else []
            if command.patience and walked and has_plateaued(walked, command.patience):
                break
        results = finish(command, prepare, ran, rows, scores)
        write_json(
            workdir / "results.json",
            {
                **results,
                "steps_of_all": sum(trial.config.train.steps for trial in planned.values()),
                "device": measure.device_name(),
                "versions": measure.versions(),
                "command": words,
            },
        )
        print(f"{workdir}: trials.csv, trials.parquet, results.json, sweep.png, and every trial's prompt under trials/")


def plan_stages(command: Sweep[Any], argv: Sequence[str]) -> list[list[Trial]]:
    """Every trial, by the lengths that are tried one after the other; without lengths all in one stage.

    Raises:
      ConfigError: a field or value is wrong, or an option has a field's place.
    """
    fields = [parse_field(text, command.config) for text in command.over]
    for name, _ in fields:
        if name == "train.seed" or (name == LENGTH and command.lengths):
            raise ConfigError(f"--over {name}: --{'seeds' if name == 'train.seed' else 'lengths'} says that")
    drawn = settings(fields, command.trials, command.draws_seed)
    stages: list[list[Trial]] = []
    for length in command.lengths or (None,):
        stage = []
        for one in drawn:
            own = one if length is None else {LENGTH: str(length), **one}
            words = [word for name, value in own.items() for word in flag_words(name, value, command.config)]
            config = resolve(parse_job(Sweep, [*argv, *words], PROGRAM).config)
            for seed in command.seeds:
                number = len(stages) * len(drawn) * len(command.seeds) + len(stage) + 1
                seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
                stage.append(Trial(number, own, seeded))
        stages.append(stage)
    return stages


def finish(
    command: Sweep[Any],
    prepare: Preparation,
    ran: Sequence[Trial],
    rows: dict[int, Row],
    scores: Sequence[Score],
) -> dict[str, Any]:
    """Chooses, saves the best prompt as `prompt/`, draws `sweep.png`, and asks the best together.

    Returns:
      What `results.json` says of it.

    Raises:
      TrainingError: no trial came to its end.
    """
    workdir = command.workdir
    if not scores:
        raise TrainingError(f"no trial came to its end; {workdir}/trials.csv says why")
    best = max(scores, key=lambda score: score.validation.mean)
    chosen, reason = best, "the highest mean on validation"
    if len(best.trials) < len(command.seeds):
        reason += " of the trials that came to their end; no setting has all of its seeds"
    if command.lengths:
        lengths = by_length(scores)
        chosen = lengths[shortest_of_the_best([score.validation for score in lengths])]
        reason = f"the shortest within one standard error of the best, {named(best.settings)}"
    number = max(chosen.trials, key=lambda own: trial_score(rows[own]))
    copy_prompt(trial_folder(workdir, number) / "prompt", workdir / "prompt")
    print(f"chosen: {named(chosen.settings)}, {reason}; {workdir}/prompt is its trial {number}")
    plot_sweep(
        workdir / "sweep.png",
        [(score.settings, score.validation, score.by_seed) for score in scores],
        chosen.settings,
        chosen.measure.replace("_", " "),
    )
    out = {trial.number: rows[trial.number]["status"] for trial in ran if not finished(rows[trial.number])}
    if out:
        print("not to their end: " + "; ".join(f"trial {number}, {status}" for number, status in out.items()))
    together = ask_together(command.ensemble, prepare, ran, rows, workdir) if command.ensemble else None
    if together is not None:
        print(
            f"the best {len(together['trials'])} together: {together['split']} accuracy {together['accuracy']:.3f}, one"
            f" by one {together['mean_accuracy']:.3f} in the mean"
        )
    return {
        "measure": chosen.measure,
        "settings": [score.as_json() for score in scores],
        "chosen": {**chosen.as_json(), "trial": number, "reason": reason},
        "ensemble": together,
        "not_to_their_end": out,
        "trials": len(ran),
        "steps": sum(rows[trial.number]["steps"] for trial in ran),
    }


def _shown(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.mean:.3f} [{low:.3f}, {high:.3f}]"
