"""The report of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.evaluation.metrics import SHARES
from spt_jax.reports.charts import Level, Line, finite, line_chart, smoothed
from spt_jax.reports.contents import (
    Chart,
    Figure,
    Report,
    Table,
    bars_of,
    confusion_of,
    interval_text,
    mistakes,
    number,
    won_and_lost,
)
from spt_jax.reports.distilled import distillation_table
from spt_jax.reports.report import ROWS, curve_metric, reference_lines
from spt_jax.reports.shared import (
    difference_sentence,
    measure_of,
    parameters_note,
    predictions_by,
    present,
    shared_parts,
    words,
    written_figures,
)
from spt_jax.studies.trials import PREDICTIONS_FILE
from spt_jax.training.logs import read_metrics

OTHERS = {"hard_prompt": "the written prompt", "no_prompt": "the base without a prompt"}


def run_report(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
    split = "test" if "test" in results else "validation"
    scores: dict[str, Mapping[str, Any]] = {name: own for name, own in results.get(split, {}).items() if own}
    soft = scores.get("soft_prompt", {})
    measure = measure_of(soft)
    against = results.get("soft_against_written")
    figures = [Figure(words(measure), number(soft.get(measure)), interval_text(soft.get(f"{measure}_interval")))]
    if other := scores.get("hard_prompt"):
        figures += written_figures(other, measure, against if against and against["measure"] == measure else None)
    figures += [
        Figure("chosen step", number(results.get("best_step"), ",d"), f"of {number(results.get('steps'), ',d')}"),
        Figure("size", f"{number(results.get('prompt_bytes'), ',d')} B", parameters_note(results)),
    ]
    bars = bars_of(
        f"{words(measure)} on {soft.get('examples', '')} {split} records, 95\u00a0% interval".capitalize(),
        [
            (ROWS.get(name, name), float(own[measure]), own.get(f"{measure}_interval"), name == "soft_prompt")
            for name, own in scores.items()
            if isinstance(own.get(measure), int | float)
        ],
        share=measure in SHARES,
        note="Lower is better." if measure in ("loss", "perplexity") else "",
    )
    predictions = predictions_by(workdir / PREDICTIONS_FILE, "prompt")
    classes, ours = results.get("classes") or {}, predictions.get("soft_prompt", [])
    other = next((name for name in OTHERS if name in predictions), "hard_prompt")
    examples = won_and_lost(ours, predictions.get(other, []), ("the soft prompt", OTHERS[other]))
    lines = read_metrics(workdir / "metrics.jsonl")
    return Report(
        kind="training run",
        title=workdir.resolve().name,
        summary=difference_sentence(against),
        figures=figures if soft else figures[-2:],
        bars=present([bars]),
        tables=present([distillation_table(results.get("distillation"), scores), all_scores(scores, split)]),
        charts=run_charts(lines, reference_lines(results.get("validation", {})), results.get("best_step")),
        confusions=present([confusion_of(f"Classes of {split} records, soft prompt", classes.get("soft_prompt"))]),
        examples=present([mistakes(ours, "the soft prompt")]) if examples is None else examples,
        **shared_parts(config, results, [own["text"] for own in [scores.get("hard_prompt")] if own and "text" in own]),
    )


def run_charts(lines: Sequence[Mapping[str, Any]], references: Mapping[str, float], chosen: int | None) -> list[Chart]:
    """Returns the curves of a run: the training loss, and the validation measure with other prompts' scores.

    Args:
      lines: the contents of `metrics.jsonl`.
      references: values of the validation measure by name.
      chosen: the step whose prompt was saved.
    """
    losses = finite([(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)])
    window = max(1, len(losses) // 50)
    drawn, keys = [Line(losses, "faint" if window > 1 else "main")], [("faint" if window > 1 else "main", "each step")]
    if window > 1:
        drawn.append(Line(smoothed(losses, window)))
        keys.append(("main", f"mean of {window} steps"))
    mark = [] if chosen is None else [("chosen", f"chosen: step {chosen:,}")]
    charts = []
    if svg := line_chart(drawn, label="training loss by step", chosen=chosen):
        charts.append(Chart("Training loss", svg, [*keys, *mark]))
    validated = [line for line in lines if "validation" in line]
    if validated:
        measure = curve_metric(validated[0]["validation"])
        points = [(line["step"], line["validation"][measure]) for line in validated]
        svg = line_chart(
            [Line(points, "accent", marked=len(points) <= 60)],
            label=f"validation {measure} by step",
            levels=[Level(value, f"{name} {value:.3f}") for name, value in references.items()],
            chosen=chosen,
            bounds=(0.0, 1.0) if measure == "accuracy" else None,
        )
        if svg:
            charts.append(Chart(f"Validation {measure}", svg, [("accent", "soft prompt"), *mark]))
    return charts


def all_scores(scores: Mapping[str, Mapping[str, Any]], split: str) -> Table | None:
    """Returns all measures of a run on one split."""
    first = next(iter(scores.values()), {})
    names = [
        name
        for name, value in first.items()
        if isinstance(value, int | float) and name not in ("examples", "words", "generated")
    ]
    rows = [[ROWS.get(name, name), *(number(own.get(column)) for column in names)] for name, own in scores.items()]
    for name, own in scores.items():
        for task, figures in own.get("tasks", {}).items():
            rows.append([f"{ROWS.get(name, name)}, {task}", *(number(figures.get(column)) for column in names)])
    return Table(f"All {split} scores", ["", *map(words, names)], rows) if names else None
