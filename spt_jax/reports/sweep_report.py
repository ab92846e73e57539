"""The report of a sweep."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.evaluation.metrics import SHARES
from spt_jax.reports.charts import Line, line_chart
from spt_jax.reports.contents import (
    ROWS,
    Bars,
    Chart,
    Figure,
    Report,
    Table,
    bars_of,
    confusion_of,
    cut,
    interval_text,
    mistakes,
    number,
)
from spt_jax.reports.shared import predictions_by, present, shared_parts, words
from spt_jax.studies.trials import MEMBERS_FILE, PREDICTIONS_FILE, ROWS_FILE, trial_folder
from spt_jax.training.logs import read_metrics


def sweep_report(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
    rows, chosen, measure = _rows(workdir / ROWS_FILE), results["chosen"], results["measure"]
    scored: Sequence[Mapping[str, Any]] = results["settings"]
    share = measure in SHARES

    def bars(split: str) -> Bars | None:
        return bars_of(
            f"{words(measure)} on {split}, mean over seeds, 95\u00a0% interval".capitalize(),
            [
                (
                    _named(own["settings"]),
                    own[split]["mean"],
                    own[split]["interval"],
                    own["settings"] == chosen["settings"],
                )
                for own in scored
                if own.get(split)
            ],
            share=share,
        )

    figures = [
        Figure("chosen", _named(chosen["settings"]), f"trial {chosen['trial']}"),
        *(
            Figure(f"{split} {words(measure)}", number(chosen[split]["mean"]), interval_text(chosen[split]["interval"]))
            for split in ("validation", "test")
            if chosen.get(split)
        ),
        Figure("trials", number(results["trials"], ",d"), f"{number(results['steps'], ',d')} steps"),
    ]
    if together := results.get("ensemble"):
        note = interval_text(together.get("accuracy_interval"))
        figures.append(Figure(f"ensemble of {len(together['trials'])}", number(together["accuracy"]), note))
    folder = trial_folder(workdir, chosen["trial"])
    by_split = predictions_by(folder / PREDICTIONS_FILE, "split")
    split, source = "test" if "test" in by_split else "validation", folder.relative_to(workdir) / PREDICTIONS_FILE
    name = f"trial {chosen['trial']}"
    own_row = next((row for row in rows if row["trial"] == chosen["trial"]), {})
    return Report(
        kind="sweep",
        title=workdir.resolve().name,
        summary=f"Chosen: {_named(chosen['settings'])}, {chosen['reason']}.",
        figures=figures,
        bars=present([bars("validation"), bars("test")]),
        tables=present([_trials(rows, scored, measure)]),
        charts=present([_trial_chart(workdir, rows, chosen["trial"], own_row.get("best_step"))]),
        confusions=present([confusion_of(f"Classes of {split} records, {name}", results.get("classes"))]),
        examples=present([mistakes(by_split.get(split, []), name, str(source))]),
        **shared_parts(config, results, []),
    )


def _trial_chart(workdir: Path, rows: Sequence[Mapping[str, Any]], chosen: int, step: int | None) -> Chart | None:
    """Returns the validation of every trial, those that were stopped early included."""
    found: dict[int, list[tuple[int, float]]] = {}
    measure = "accuracy" if any("validation.accuracy" in row for row in rows) else "loss"
    for path in sorted((workdir / "populations").glob(f"*/{MEMBERS_FILE}")):
        numbers = json.loads(path.read_bytes())
        for line in read_metrics(path.with_name("metrics.jsonl")):
            for member, metrics in line.get("validation", {}).items():
                found.setdefault(numbers[int(member)], []).append((line["step"], metrics.get(measure, math.nan)))
    lines = [Line(points, "faint") for number, points in found.items() if number != chosen]
    lines.append(Line(found.get(chosen, []), "accent"))
    svg = line_chart(
        lines,
        label=f"validation {measure} of every trial by step",
        chosen=step,
        bounds=(0.0, 1.0) if measure == "accuracy" else None,
    )
    keys = [("accent", f"trial {chosen}"), ("faint", f"the other {len(found) - 1} trials"), ("chosen", f"step {step}")]
    return None if svg is None else Chart(f"Validation {measure} of every trial", svg, keys)


def _trials(rows: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]], measure: str) -> Table:
    fields = list(dict.fromkeys(name for own in scored for name in own["settings"]))
    known = measure if any(f"validation.{measure}" in row for row in rows) else "loss"
    splits = [split for split in ("validation", "test") if any(f"{split}.{known}" in row for row in rows)]
    shown = [
        [
            str(row["trial"]),
            *(cut(str(row.get(field, "-"))) for field in fields),
            str(row.get("seed", "-")),
            cut(str(row.get("status", "-"))),
            number(row.get("steps"), ",d"),
            number(row.get("best_step"), ",d"),
            *(number(row.get(f"{split}.{known}")) for split in splits),
        ]
        for row in rows[:ROWS]
    ]
    left_out = f"{len(rows) - ROWS} more are in trials.csv" if len(rows) > ROWS else ""
    columns = [
        "trial",
        *fields,
        "seed",
        "status",
        "steps",
        "best step",
        *(f"{split} {words(known)}" for split in splits),
    ]
    return Table("Trials", columns, shown, left_out)


def _named(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "all trials"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of the trials of a sweep."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line)["row"] for line in lines if line]
