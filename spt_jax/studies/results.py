"""Results of the trials of a sweep: scores of settings, and the ensemble of the best trials."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.errors import ConfigError
from spt_jax.evaluation.classes import class_report
from spt_jax.evaluation.ensembles import evaluate_ensemble
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.evaluation.inspection import NEAREST, nearest_words
from spt_jax.evaluation.metrics import SHARES
from spt_jax.evaluation.predictions import measures, read_predictions, record_values
from spt_jax.experiment.run import Experiment
from spt_jax.prompts.storage import INFO_FILE, load_prompt
from spt_jax.prompts.writing import write_directory
from spt_jax.studies.plateau import Estimate, estimates
from spt_jax.studies.settings import Settings, named
from spt_jax.studies.trials import PREDICTIONS_FILE, Preparation, Prepared, Row, Trial, trial_folder

LENGTH = "method.length"


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of a setting.

    Attributes:
      settings: the setting.
      trials: the numbers of its finished trials.
      measure: the name of the score, from `predictions.measures`.
      by_seed: each trial's validation score.
      validation: mean validation score.
      test: mean test score; None without test data.
    """

    settings: Settings
    trials: tuple[int, ...]
    measure: str
    by_seed: tuple[float, ...]
    validation: Estimate
    test: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """Returns the scores in the format of `results.json`."""
        return {
            "settings": self.settings,
            "trials": self.trials,
            "validation": self.validation.as_json(),
            "test": None if self.test is None else self.test.as_json(),
        }


def scored(workdir: Path, rows: dict[int, Row], trials: Sequence[Trial]) -> list[Score]:
    """Returns the scores of the settings whose trials have all finished.

    If there is no such setting, returns those with any finished trial, scored by the finished ones.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in trials:
        by_setting.setdefault(json.dumps(trial.settings), []).append(trial)
    ended = [[trial for trial in planned if finished(rows[trial.number])] for planned in by_setting.values()]
    complete = [done for done, planned in zip(ended, by_setting.values(), strict=True) if len(done) == len(planned)]
    chosen = complete or [done for done in ended if done]
    if not chosen:
        return []
    read = [
        [read_predictions(trial_folder(workdir, trial.number) / PREDICTIONS_FILE, by="split") for trial in done]
        for done in chosen
    ]
    measure = measures(read[0][0]["validation"])[0]

    def values(split: str) -> list[Float[np.ndarray, "R N"]]:
        return [np.stack([record_values(one[split], measure) for one in predictions]) for predictions in read]

    validation, bounds = values("validation"), (0.0, 1.0) if measure in SHARES else (-math.inf, math.inf)
    tests = estimates(values("test"), bounds) if "test" in read[0][0] else [None] * len(chosen)
    return [
        Score(
            settings=done[0].settings,
            trials=tuple(trial.number for trial in done),
            measure=measure,
            by_seed=tuple(scores.mean(axis=1).tolist()),
            validation=estimate,
            test=test,
        )
        for done, scores, estimate, test in zip(chosen, validation, estimates(validation, bounds), tests, strict=True)
    ]


def validation_mean(workdir: Path, number: int, measure: str) -> float | None:
    """Returns a trial's validation score by its best prompt; None if it was stopped before its first validation."""
    path = trial_folder(workdir, number) / PREDICTIONS_FILE
    if not path.exists():
        return None
    return float(record_values(read_predictions(path, by="split")["validation"], measure).mean())


def chosen_details(workdir: Path, number: int, experiment: Experiment) -> dict[str, Any]:
    """Returns the entries of `results.json` about the prompt of the chosen trial.

    Returns:
      "classes", its `class_report` on test records, or on validation records without test data, with "split"; without
      classes, None. "nearest_tokens", the vocabulary entries nearest to each of its virtual tokens.
    """
    predictions = read_predictions(trial_folder(workdir, number) / PREDICTIONS_FILE, by="split")
    split = "test" if "test" in predictions else "validation"
    report = class_report(predictions[split], list(experiment.template.verbalizers))
    words: list[list[tuple[str, float]]] = []
    if (workdir / "prompt" / INFO_FILE).exists():  # a prompt for several tasks has a directory for each
        words = nearest_words(experiment.base, load_prompt(workdir / "prompt", experiment.base).virtual, NEAREST)
    return {"classes": report and {"split": split, **report}, "nearest_tokens": words}


def check_ensemble(every: Sequence[Prepared]) -> None:
    """Checks that the prompts of these trials can form an ensemble.

    Raises:
      ConfigError: the task is not classification, there is one prompt per task, virtual tokens depend on the input, or
        the trials differ in base, records, classes or head.
    """
    first = every[0]
    for prepared in every:
        template, base = prepared.experiment.template, prepared.experiment.base
        if not template.verbalizers or template.reads:
            raise ConfigError("--ensemble needs a classification task, and this is not one")
        if template.task is not None:
            raise ConfigError("--ensemble is not compatible with data.task, which gives each task its own prompt")
        if template.per_input:
            name = prepared.experiment.config.method.name
            raise ConfigError(f"--ensemble is not compatible with {name}, whose virtual tokens depend on each input")
        if base.fingerprint != first.experiment.base.fingerprint:
            raise ConfigError("--ensemble needs the same base for all trials, and these have different ones")
        if any(list(data.records) != list(first.asked[split].records) for split, data in prepared.asked.items()):
            raise ConfigError("--ensemble needs the same records for all trials, and these have different ones")
        if tuple(template.verbalizers) != tuple(first.experiment.template.verbalizers):
            raise ConfigError("--ensemble needs the same classes for all trials, and these have different ones")
        if template.head != first.experiment.template.head:
            raise ConfigError("--ensemble needs the same head for all trials, and these have different ones")


def check_comparable(trials: Sequence[Trial], every: Sequence[Prepared]) -> None:
    """Checks that all trials are scored by one measure, and that all or none have test records.

    Args:
      trials: the trials.
      every: the same trials, prepared.

    Raises:
      ConfigError: some are scored otherwise than the first, or have no test data where it has some, or the reverse.
    """
    first = every[0]
    for trial, prepared in zip(trials, every, strict=True):
        both = f"{named(trial.settings)} and {named(trials[0].settings)}"
        if _scored_by(prepared) != _scored_by(first):
            raise ConfigError(f"a sweep compares trials by one measure, and {both} are tasks with different ones")
        if prepared.asked.keys() != first.asked.keys():
            raise ConfigError(
                f"one of {both} has test records, and the other has none; give both, or leave out data.test"
            )


def _scored_by(prepared: Prepared) -> str:
    template = prepared.experiment.template
    return "classes" if template.verbalizers else template.head


def finished(row: Row) -> bool:
    """Whether a trial ran to the end, neither halved nor dropped, and has a validation score."""
    return not row["status"].startswith(("halved", "dropped")) and trial_score(row) > -math.inf


def by_length(scores: Sequence[Score]) -> list[Score]:
    """Returns the best setting of each length, shortest first."""
    best: dict[str, Score] = {}
    for score in scores:
        length = score.settings[LENGTH]
        if length not in best or score.validation.mean > best[length].validation.mean:
            best[length] = score
    return list(best.values())


def trial_score(row: Row) -> float:
    """Returns the validation score for ranking trials; -inf if there is none."""
    metrics = {name.removeprefix("validation."): value for name, value in row.items() if name.startswith("validation.")}
    return selection_score(metrics) if metrics else -math.inf


def copy_prompt(source: Path, target: Path) -> None:
    """Copies a saved prompt, or the prompts of several tasks."""
    for info in source.rglob(INFO_FILE):
        files = {file.name: file.read_bytes() for file in info.parent.iterdir()}
        (target / info.parent.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        write_directory(target / info.parent.relative_to(source), files)


def ask_together(
    count: int, prepare: Preparation, ran: Sequence[Trial], rows: dict[int, Row], workdir: Path
) -> dict[str, Any]:
    """Evaluates an ensemble of the `count` best trials by validation, on test records if there are any.

    Finished trials rank before trials that were stopped early.
    """

    def rank(trial: Trial) -> tuple[bool, float]:
        row = rows[trial.number]
        return finished(row), trial_score(row)

    with_prompt = [trial for trial in ran if trial_score(rows[trial.number]) > -math.inf]
    chosen = sorted(with_prompt, key=rank, reverse=True)[:count]
    members = [prepare(trial) for trial in chosen]
    base = members[0].experiment.base
    split = "test" if "test" in members[0].asked else "validation"
    prompts = [load_prompt(trial_folder(workdir, trial.number) / "prompt", base).virtual for trial in chosen]
    together = evaluate_ensemble(base, [member.asked[split] for member in members], prompts)
    accuracies = [rows[trial.number][f"{split}.accuracy"] for trial in chosen]
    return {
        "trials": [trial.number for trial in chosen],
        "split": split,
        "accuracy": together.metrics["accuracy"],
        "accuracy_interval": together.metrics["accuracy_interval"],
        "mean_accuracy": float(np.mean(accuracies)),
    }
