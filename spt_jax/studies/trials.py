"""Trials: the runs of a sweep, trained together if one compiled step can train them."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import BatchPlan
from spt_jax.data.examples import Example
from spt_jax.errors import CheckpointError
from spt_jax.evaluation.evaluate import EvaluationSet, evaluate
from spt_jax.evaluation.predictions import predictions_jsonl, with_fields
from spt_jax.experiment.command_line import config_json
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.experiment.run import Experiment, load_experiment
from spt_jax.experiment.shared_studies import SharedStudies
from spt_jax.runtime.files import write_json, write_text
from spt_jax.studies.settings import Settings, named
from spt_jax.studies.table import flat, write_table
from spt_jax.studies.trial_logs import PopulationLog
from spt_jax.training.halving import Halving, fit_population
from spt_jax.training.logs import RunInfo, Trackers, publish, run_id
from spt_jax.training.loop import Standing
from spt_jax.training.optimizers import resolve_optimizer
from spt_jax.training.population import Member, default_group_size

Row = dict[str, Any]
PREDICTIONS_FILE = "predictions.jsonl"
ROWS_FILE = "trials.jsonl"
MEMBERS_FILE = "members.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a sweep: its number, from 1, the fields that it sets, and its resolved config with the seed."""

    number: int
    settings: Settings
    config: ExperimentConfig[Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A trial's experiment, its training examples, the shapes of their batches, and its evaluation sets by split."""

    experiment: Experiment
    examples: Sequence[Example]
    plan: BatchPlan
    asked: Mapping[str, EvaluationSet]


class Preparation:
    """Prepares trials. Trials that differ only in seed and optimizer share their data; trials on one base share it.

    Args:
      saved_studies: the folder in which an earlier part of the sweep stored its self-studies; None if there is none.

    Attributes:
      studies: the self-studies of the trials, which those that differ in nothing else share.
    """

    def __init__(self, saved_studies: Path | None = None) -> None:
        self.studies = SharedStudies(saved_studies)
        self._bases: dict[str, FrozenBase] = {}
        self._prepared: dict[str, Prepared] = {}

    def __call__(self, trial: Trial) -> Prepared:
        """Returns the trial, ready to train.

        Raises:
          ConfigError, DataError, CheckpointError: as in `load_experiment`.
        """
        config = trial.config
        fields = config_json(config)
        key = json.dumps({**fields, "optimizer": None, "train": {**fields["train"], "seed": None}})
        if key not in self._prepared:
            place = json.dumps([fields["base"], fields["mesh"], fields["data"]["max_length"]])
            self._prepared[key] = _prepared(config, self._bases.get(place), self.studies)
            self._bases[place] = self._prepared[key].experiment.base
        found = self._prepared[key]
        loaded, base = found.experiment.config, found.experiment.base
        optimizer = resolve_optimizer(config.optimizer, base.family, loaded.method.recipe_for(base.layout))
        updated = dataclasses.replace(loaded, train=config.train, optimizer=optimizer)
        return dataclasses.replace(found, experiment=dataclasses.replace(found.experiment, config=updated))


def _prepared(config: ExperimentConfig[Any], base: FrozenBase | None, studies: SharedStudies) -> Prepared:
    experiment = load_experiment(config, base, study=studies)
    examples, plan = experiment.training_set()
    experiment, _ = experiment.fitted(plan, together=default_group_size())
    asked = {
        split: experiment.evaluation_set(records, experiment.template)
        for split, records in (("validation", experiment.validation), ("test", experiment.test))
        if records is not None
    }
    return Prepared(experiment, examples, plan, asked)


def populations(trials: Sequence[Trial], prepare: Preparation) -> list[list[Trial]]:
    """Groups trials that one compiled step can train: they differ only in initializer, learning rate, seed and data."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        fields = config_json(prepare(trial).experiment.config)
        fields["method"].pop("init", None)
        fields["optimizer"].pop("learning_rate")
        fields["train"].pop("seed")
        data = fields.pop("data")
        key = json.dumps([fields, data["max_length"], len(data["verbalizers"])])
        found.setdefault(key, []).append(trial)
    return list(found.values())


def train_population(
    trials: Sequence[Trial],
    prepare: Preparation,
    workdir: Path,
    *,
    halving: Halving | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Trains trials together, or resumes them, and saves their results.

    Args:
      trials: the trials, from one of the `populations`.
      prepare: prepares trials.
      workdir: receives `populations/NNN/` with checkpoints and logs, and `trials/NNN/` with each trial's prompt and
        predictions.
      halving: when to stop the worse half of the trials; None to train all to the end.
      facts: further entries for the metadata of saved prompts.

    Returns:
      A row of the sweep's table for each trial.

    Raises:
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    all_prepared = [prepare(trial) for trial in trials]
    experiment, config = all_prepared[0].experiment, all_prepared[0].experiment.config

    def validate(number: int, params: Any) -> dict[str, Any]:
        prepared = all_prepared[number]
        virtual = prepared.experiment.virtual(params)
        return evaluate(experiment.base, prepared.asked["validation"], virtual, generated=False).metrics

    members = [
        Member(
            prepared.experiment.config.method,
            prepared.examples,
            prepared.plan,
            trial.config.train.seed,
            prepared.experiment.config.optimizer.learning_rate or 0.0,  # resolved, never 0
            config.loss.class_weights or None,
            prepared.experiment.questions,
        )
        for trial, prepared in zip(trials, all_prepared, strict=True)
    ]
    folder = workdir / "populations" / f"{trials[0].number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    # The logs number the trials from 0, in this order.
    write_json(folder / MEMBERS_FILE, [trial.number for trial in trials])
    infos = [_run_info(trial, prepared, workdir) for trial, prepared in zip(trials, all_prepared, strict=True)]

    def log(step: int) -> PopulationLog:
        def tracked(trial: Trial, info: RunInfo) -> Trackers:
            own = trial_folder(workdir, trial.number)
            own.mkdir(parents=True, exist_ok=True)
            return Trackers(own, config.log, info, from_step=step)

        trackers = [functools.partial(tracked, trial, info) for trial, info in zip(trials, infos, strict=True)]
        return PopulationLog(folder, trackers, from_step=step)

    standings = fit_population(
        experiment.base,
        members,
        config.optimizer,
        experiment.objective(all_prepared[0].plan),
        config.train,
        workdir=folder,
        validate=validate,
        halving=halving,
        log=log,
        resume=True,
        names=[f"trial {trial.number} ({named(trial.settings)})" for trial in trials],
    )
    rows = [
        _ended(trial, prepared, standing, trial_folder(workdir, trial.number), facts or {})
        for trial, prepared, standing in zip(trials, all_prepared, standings, strict=True)
    ]
    for row, info in zip(rows, infos, strict=True):
        own = trial_folder(workdir, row["trial"])
        prompt = own / "prompt"
        publish(own, config.log, info=info, results=row, prompt=prompt if prompt.exists() else None)
    return rows


def _run_info(trial: Trial, prepared: Prepared, workdir: Path) -> RunInfo:
    """Returns what Weights & Biases is told about a trial; the sweep's id keeps sweeps of one name apart."""
    config = config_json(prepared.experiment.config)
    if not config["log"]["wandb"]:
        return RunInfo(config)
    words = f"{named(trial.settings)}, " if trial.settings else ""
    name = f"trial {trial.number}: {words}seed {trial.config.train.seed}"
    return RunInfo(config, name, f"{workdir.name} {run_id(workdir)[:8]}")


def trial_numbers(trials: Sequence[Trial]) -> str:
    """Returns a short name of trials that are trained together, such as "trials 1 to 8"."""
    first, last = trials[0].number, trials[-1].number
    if first == last:
        return f"trial {first}"
    if last - first + 1 == len(trials):
        return f"trials {first} to {last}"
    return f"{len(trials)} trials from {first} to {last}"


def trial_folder(workdir: Path, number: int) -> Path:
    """Returns the directory of a trial's prompt and predictions."""
    return workdir / "trials" / f"{number:03d}"


def _ended(trial: Trial, prepared: Prepared, standing: Standing, folder: Path, facts: Mapping[str, Any]) -> Row:
    experiment, best = prepared.experiment, standing.best
    results = {}
    if best.metrics is not None:  # None if it failed before its first validation
        folder.mkdir(parents=True, exist_ok=True)
        extra = {"step": best.step, "validation": best.metrics, "settings": trial.settings, **facts}
        experiment.save(folder / "prompt", best.params, extra)
        virtual = experiment.virtual(best.params)
        results = {
            split: evaluate(experiment.base, asked, virtual, generated=split == "test")
            for split, asked in prepared.asked.items()
        }
        write_text(
            folder / PREDICTIONS_FILE,
            predictions_jsonl(
                {
                    split: with_fields(
                        result.predictions, prepared.asked[split].records, experiment.template.prompt_fields
                    )
                    for split, result in results.items()
                },
                by="split",
            ),
        )
    fields = flat(config_json(experiment.config))
    return {
        "trial": trial.number,
        **{name: fields.pop(name) for name in trial.settings if name in fields},
        "seed": fields.pop("train.seed"),
        "status": standing.ended,
        "steps": standing.steps,
        "best_step": best.step,
        **{
            name: value
            for split, result in results.items()
            for name, value in flat(_without_lists(result.metrics), f"{split}.").items()
        },
        "trainable_parameters": experiment.config.method.trainable_count(best.params),
        "prompt_bytes": sum(file.stat().st_size for file in (folder / "prompt").rglob("prompt.*")),
        **fields,
    }


def _without_lists(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces each interval by two entries, its low and high ends."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if name.endswith("_interval"):
            found[name.replace("_interval", "_low")], found[name.replace("_interval", "_high")] = value
        else:
            found[name] = value
    return found


def write_rows(workdir: Path, planned: dict[int, Trial], rows: dict[int, Row]) -> None:
    """Writes the table as JSON lines, from which a sweep is resumed, as CSV and as Parquet."""
    lines = [{**_identity(planned[number]), "row": rows[number]} for number in sorted(rows)]
    write_text(workdir / ROWS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_table(workdir / "trials", [line["row"] for line in lines])


def read_rows(workdir: Path, planned: dict[int, Trial]) -> dict[int, Row]:
    """Returns the rows of the trials that have ended.

    Raises:
      CheckpointError: the table is damaged or belongs to another sweep.
    """
    path = workdir / ROWS_FILE
    found: dict[int, Row] = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(filter(None, lines), start=1):
        try:
            saved = json.loads(line)
            row = saved.pop("row")
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path}, line {number}, is damaged ({error}); start over with --overwrite"
            ) from error
        here = _identity(planned[row["trial"]]) if row["trial"] in planned else None
        if saved != here:
            raise CheckpointError(
                f"{path} is from another sweep: trial {row['trial']} is {saved} there, but"
                f" {here or 'none'} here. Give another --workdir, or --overwrite"
            )
        found[row["trial"]] = row
    return found


def _identity(trial: Trial) -> dict[str, Any]:
    return {"settings": trial.settings, "seed": trial.config.train.seed}
