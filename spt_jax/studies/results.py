"""What came of the trials of a sweep: scores of settings, the best trials, and these together."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.errors import ConfigError
from spt_jax.evaluation.ensembles import evaluate_ensemble
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.evaluation.predictions import measures, read_predictions, record_values
from spt_jax.prompts.storage import INFO_FILE, load_prompt, write_directory
from spt_jax.studies.plateau import Estimate, estimates
from spt_jax.studies.settings import Settings
from spt_jax.studies.trials import PREDICTIONS_FILE, Preparation, Prepared, Row, Trial, trial_folder

LENGTH = "method.length"


@dataclasses.dataclass(frozen=True)
class Score:
    """A setting, its trials that came to their end, and their scores on validation and test.

    measure: what is scored, a name of `predictions.measures`.
    by_seed: each trial's score on validation.
    """

    settings: Settings
    trials: tuple[int, ...]
    measure: str
    by_seed: tuple[float, ...]
    validation: Estimate
    test: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """As `results.json` has it."""
        return {
            "settings": self.settings,
            "trials": self.trials,
            "validation": self.validation.as_json(),
            "test": None if self.test is None else self.test.as_json(),
        }


def scored(workdir: Path, rows: dict[int, Row], trials: Sequence[Trial]) -> list[Score]:
    """Every setting all of whose trials came to their end; if there is none, those of which any did, by these."""
    by_setting: dict[str, list[Trial]] = {}
    for trial in trials:
        by_setting.setdefault(json.dumps(trial.settings), []).append(trial)
    ended = [[trial for trial in own if finished(rows[trial.number])] for own in by_setting.values()]
    whole = [own for own, planned in zip(ended, by_setting.values(), strict=True) if len(own) == len(planned)]
    every = whole or [own for own in ended if own]
    if not every:
        return []
    read = [
        [read_predictions(trial_folder(workdir, trial.number) / PREDICTIONS_FILE, by="split") for trial in own]
        for own in every
    ]
    measure = measures(read[0][0]["validation"])[0]

    def values(split: str) -> list[Float[np.ndarray, "R N"]]:
        return [np.stack([record_values(one[split], measure) for one in own]) for own in read]

    validation = values("validation")
    tests = estimates(values("test")) if "test" in read[0][0] else [None] * len(every)
    return [
        Score(
            settings=own[0].settings,
            trials=tuple(trial.number for trial in own),
            measure=measure,
            by_seed=tuple(scores.mean(axis=1).tolist()),
            validation=estimate,
            test=test,
        )
        for own, scores, estimate, test in zip(every, validation, estimates(validation), tests, strict=True)
    ]


def check_ensemble(every: Sequence[Prepared]) -> None:
    """Whether the prompts of any of these can be asked together.

    Raises:
      ConfigError: their answers are no classes, several tasks have prompts of their own, or there are several bases,
        sets of records, classes or kinds of prompts.
    """
    first = every[0]
    for prepared in every:
        template, base = prepared.experiment.template, prepared.experiment.base
        if not template.verbalizers or template.reads:
            raise ConfigError("--ensemble combines answers that are classes, and this task has none")
        if template.task is not None:
            raise ConfigError("--ensemble combines prompts of one task; here every task has its own")
        if base.fingerprint != first.experiment.base.fingerprint:
            raise ConfigError("--ensemble asks one base, and these trials have several")
        if any(list(own.records) != list(first.asked[split].records) for split, own in prepared.asked.items()):
            raise ConfigError("--ensemble asks the same records, and these trials have different ones")
        if tuple(template.verbalizers) != tuple(first.experiment.template.verbalizers):
            raise ConfigError("--ensemble combines answers in the same classes, and these trials have different ones")
        if template.head != first.experiment.template.head:
            raise ConfigError("--ensemble combines prompts with a head, or prompts without, and not both")


def finished(row: Row) -> bool:
    """Neither halved nor dropped, and with a prompt to show for it."""
    return not row["status"].startswith(("halved", "dropped")) and trial_score(row) > -math.inf


def by_length(scores: Sequence[Score]) -> list[Score]:
    """The best setting of every length, shortest first."""
    best: dict[str, Score] = {}
    for score in scores:
        length = score.settings[LENGTH]
        if length not in best or score.validation.mean > best[length].validation.mean:
            best[length] = score
    return list(best.values())


def trial_score(row: Row) -> float:
    """By which a trial is better than another."""
    metrics = {name.removeprefix("validation."): value for name, value in row.items() if name.startswith("validation.")}
    return selection_score(metrics) if metrics else -math.inf


def copy_prompt(source: Path, target: Path) -> None:
    """A saved prompt, or those of several tasks."""
    for info in source.rglob(INFO_FILE):
        files = {file.name: file.read_bytes() for file in info.parent.iterdir()}
        (target / info.parent.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        write_directory(target / info.parent.relative_to(source), files)


def ask_together(
    count: int, prepare: Preparation, ran: Sequence[Trial], rows: dict[int, Row], workdir: Path
) -> dict[str, Any]:
    """So many of the best trials by validation, asked together, on test records if there are any.

    Those that came to their end are before those that were stopped with a prompt.
    """

    def rank(trial: Trial) -> tuple[bool, float]:
        row = rows[trial.number]
        return finished(row), trial_score(row)

    having = [trial for trial in ran if trial_score(rows[trial.number]) > -math.inf]
    chosen = sorted(having, key=rank, reverse=True)[:count]
    every = [prepare(trial) for trial in chosen]
    base = every[0].experiment.base
    split = "test" if "test" in every[0].asked else "validation"
    prompts = [load_prompt(trial_folder(workdir, trial.number) / "prompt", base).virtual for trial in chosen]
    together = evaluate_ensemble(base, [own.asked[split] for own in every], prompts)
    alone = [rows[trial.number][f"{split}.accuracy"] for trial in chosen]
    return {
        "trials": [trial.number for trial in chosen],
        "split": split,
        "accuracy": together.metrics["accuracy"],
        "accuracy_interval": together.metrics["accuracy_interval"],
        "mean_accuracy": float(np.mean(alone)),
    }
