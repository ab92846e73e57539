"""Makes the report of a work directory from its files; no base is loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError
from spt_jax.evaluation.predictions import Prediction, read_predictions
from spt_jax.experiment.workdir import CONFIG_FILE
from spt_jax.reports.charts import Level, Line, finite, line_chart, smoothed
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
    p_value,
    won_and_lost,
)
from spt_jax.reports.report import ROWS as PROMPTS
from spt_jax.reports.report import reference_lines
from spt_jax.studies.trials import MEMBERS_FILE, PREDICTIONS_FILE, ROWS_FILE, trial_folder
from spt_jax.training.logs import read_metrics

SHARES = ("accuracy", "exact_match")
OTHERS = {"hard_prompt": "the written prompt", "no_prompt": "the base without a prompt"}


def read_report(workdir: Path) -> Report:
    """Returns the report of a run, a sweep or a comparison.

    Args:
      workdir: the work directory; it must have been finished.

    Raises:
      ConfigError: there is none, or it is unfinished or damaged.
      CheckpointError, DataError: the metrics or the predictions are damaged.
    """
    config = _json(workdir / CONFIG_FILE)
    if (workdir / "compare.json").exists():
        return _comparison(workdir, config.get("config", config), _json(workdir / "compare.json"))
    results = _json(workdir / "results.json")
    return (_sweep if "sweep" in config else _run)(workdir, config, results)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {path}, so {path.parent} is not the work directory of a finished run, sweep or comparison"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    return found


def _run(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
    split = "test" if "test" in results else "validation"
    scores = {name: own for name, own in results.get(split, {}).items() if own}
    soft = scores.get("soft_prompt", {})
    measure = measure_of(soft)
    against = results.get("soft_against_written")
    figures = [Figure(words(measure), number(soft.get(measure)), interval_text(soft.get(f"{measure}_interval")))]
    if other := scores.get("hard_prompt"):
        figures += _other_figures(other, measure, against if against and against["measure"] == measure else None)
    figures += [
        Figure("chosen step", number(results.get("best_step"), ",d"), f"of {number(results.get('steps'), ',d')}"),
        Figure("size", f"{number(results.get('prompt_bytes'), ',d')} B", _parameters(results)),
    ]
    bars = bars_of(
        f"{words(measure)} on {soft.get('examples', '')} {split} records, 95\u00a0% interval".capitalize(),
        [
            (PROMPTS.get(name, name), own[measure], own.get(f"{measure}_interval"), name == "soft_prompt")
            for name, own in scores.items()
            if isinstance(own.get(measure), int | float)
        ],
        share=measure in SHARES,
        note="Lower is better." if measure in ("loss", "perplexity") else "",
    )
    predictions = _predictions(workdir / PREDICTIONS_FILE, "prompt")
    classes, ours = results.get("classes") or {}, predictions.get("soft_prompt", [])
    other = next((name for name in OTHERS if name in predictions), None)
    examples = other and won_and_lost(ours, predictions[other], ("the soft prompt", OTHERS[other]))
    lines = read_metrics(workdir / "metrics.jsonl")
    return Report(
        kind="training run",
        title=workdir.resolve().name,
        summary=_against(against),
        figures=figures if soft else figures[-2:],
        bars=_present([bars]),
        tables=_present([_all_scores(scores, split)]),
        charts=run_charts(lines, reference_lines(results.get("validation", {})), results.get("best_step")),
        confusions=_present([confusion_of(f"Classes of {split} records, soft prompt", classes.get("soft_prompt"))]),
        examples=examples or _present([mistakes(ours, "the soft prompt")]),
        **_common(config, results, [own["text"] for own in [scores.get("hard_prompt")] if own and "text" in own]),
    )


def _comparison(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
    table: Sequence[Mapping[str, Any]] = results["table"]
    first, measure = table[0], table[0]["measure"]
    bars = bars_of(
        f"{words(measure)} on {first['records']} test records, 95\u00a0% interval".capitalize(),
        [(own["name"], own[measure], own.get(f"{measure}_interval"), own is first) for own in table],
        share=measure in SHARES,
    )
    predictions = _predictions(workdir / PREDICTIONS_FILE, "prompt")
    written = [own for own in table[1:] if own["name"].startswith("hand-written: ")]
    others = written or [own for own in table[1:] if own["name"] == "no prompt"] or list(table[1:])
    best = max(others, key=lambda own: own[measure], default=None)
    ours = predictions.get(first["name"], [])
    names = "the soft prompt", "the written prompt" if written else best["name"] if best else ""
    examples = best and won_and_lost(ours, predictions.get(best["name"], []), names)
    figures = [Figure(words(measure), number(first[measure]), interval_text(first.get(f"{measure}_interval")))]
    if written:
        figures += _other_figures(best, measure, best)
    columns = (
        (
            "first row ahead by",
            lambda own: f"{number(own.get('ahead'), '+.3f')} {interval_text(own.get('ahead_interval'))}",
        ),
        ("p (McNemar)", lambda own: p_value(own.get("p_mcnemar"))),
        ("p (bootstrap)", lambda own: p_value(own.get("p_bootstrap"))),
        ("trained parameters", lambda own: number(own.get("trainable_parameters"), ",")),
        ("bytes", lambda own: number(own.get("bytes"), ",")),
        ("extra tokens", lambda own: number(own.get("extra_tokens"), ",.1f")),
        ("training s", lambda own: number(own.get("train_seconds"), ",.1f")),
        ("test s", lambda own: number(own.get("test_seconds"), ",.1f")),
    )
    return Report(
        kind="comparison",
        title=workdir.resolve().name,
        summary=_against({**best, "measure": measure}) if written else "",
        figures=[*figures, Figure("size", f"{number(first.get('bytes'), ',d')} B", _parameters(first))],
        bars=_present([bars]),
        tables=[
            Table(
                "Differences and costs",
                ["", *(name for name, _ in columns)],
                [[cut(own["name"]), *(text(own) for _, text in columns)] for own in table],
            )
        ],
        charts=[],
        confusions=_present(
            [confusion_of(f"Classes, {first['name']}", (results.get("classes") or {}).get(first["name"]))]
        ),
        examples=examples or _present([mistakes(ours, first["name"])]),
        **_common(config, results, [best["name"].removeprefix("hand-written: ")] if written else []),
    )


def _sweep(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
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
    by_split = _predictions(folder / PREDICTIONS_FILE, "split")
    split, source = "test" if "test" in by_split else "validation", folder.relative_to(workdir) / PREDICTIONS_FILE
    name = f"trial {chosen['trial']}"
    own_row = next((row for row in rows if row["trial"] == chosen["trial"]), {})
    return Report(
        kind="sweep",
        title=workdir.resolve().name,
        summary=f"Chosen: {_named(chosen['settings'])}, {chosen['reason']}.",
        figures=figures,
        bars=_present([bars("validation"), bars("test")]),
        tables=_present([_trials(rows, scored, measure)]),
        charts=_present([_trial_chart(workdir, rows, chosen["trial"], own_row.get("best_step"))]),
        confusions=_present([confusion_of(f"Classes of {split} records, {name}", results.get("classes"))]),
        examples=_present([mistakes(by_split.get(split, []), name, str(source))]),
        **_common(config, results, []),
    )


def _other_figures(other: Mapping[str, Any], measure: str, against: Mapping[str, Any] | None) -> list[Figure]:
    """Returns the score of the written prompt, and how far the soft prompt is ahead of it."""
    figures = [Figure("written prompt", number(other.get(measure)), interval_text(other.get(f"{measure}_interval")))]
    if against:
        figures.append(Figure("difference", number(against["ahead"], "+.3f"), interval_text(against["ahead_interval"])))
    return figures


def measure_of(scores: Mapping[str, Any]) -> str:
    """Returns the measure that is shown of a result: accuracy, exact match, perplexity or loss."""
    return next((name for name in (*SHARES, "perplexity") if name in scores), "loss")


def words(measure: str) -> str:
    """Returns a measure's name as words."""
    return measure.replace("_", " ")


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
        measure = "accuracy" if "accuracy" in validated[0]["validation"] else "loss"
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


def _trial_chart(workdir: Path, rows: Sequence[Mapping[str, Any]], chosen: int, step: int | None) -> Chart | None:
    """Returns the validation of every trial, those that were stopped early included."""
    found: dict[int, list[tuple[float, float]]] = {}
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
    return svg and Chart(f"Validation {measure} of every trial", svg, keys)


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


def _all_scores(scores: Mapping[str, Mapping[str, Any]], split: str) -> Table | None:
    """Returns all measures of a run on one split."""
    first = next(iter(scores.values()), {})
    names = [
        name
        for name, value in first.items()
        if isinstance(value, int | float) and name not in ("examples", "words", "generated")
    ]
    rows = [[PROMPTS.get(name, name), *(number(own.get(column)) for column in names)] for name, own in scores.items()]
    for name, own in scores.items():
        for task, figures in own.get("tasks", {}).items():
            rows.append([f"{PROMPTS.get(name, name)}, {task}", *(number(figures.get(column)) for column in names)])
    return Table(f"All {split} scores", ["", *map(words, names)], rows) if names else None


def _against(against: Mapping[str, Any] | None) -> str:
    """Returns a sentence on the difference between the soft and the written prompt."""
    if not against:
        return ""
    tests = [("McNemar", against.get("p_mcnemar")), ("paired bootstrap", against.get("p_bootstrap"))]
    p = " and ".join(f"p = {p_value(value)} ({name})" for name, value in tests if value is not None)
    side, measure = "ahead of" if against["ahead"] >= 0 else "behind", words(against["measure"])
    return (
        f"The soft prompt is {side} the best written prompt by {abs(against['ahead']):.3f} in {measure}"
        f" (95\u00a0% interval of the difference {interval_text(against['ahead_interval'])}; {p})."
    )


def _parameters(results: Mapping[str, Any]) -> str:
    count = results.get("trainable_parameters")
    return "" if count is None else f"{count:,} trained parameters"


def _common(config: Mapping[str, Any], results: Mapping[str, Any], written: Sequence[str]) -> dict[str, Any]:
    """Returns the parts that all reports have."""
    data, base, method = (config.get(name) or {} for name in ("data", "base", "method"))
    versions = results.get("versions") or {}
    prompt = [("template", data.get("prompt") or ""), ("target", data.get("target") or "")]
    verbalizers = data.get("verbalizers") or {}
    prompt += (
        [("classes", ", ".join(f"{name} = {text!r}" for name, text in verbalizers.items()))] if verbalizers else []
    )
    prompt += [("best written prompt", text) for text in written]
    inputs = results.get("data") or (config.get("inputs") or {}).get("data") or {}
    environment = [
        ("date", results.get("date")),
        ("git commit", results.get("git_commit")),
        ("base", base.get("path")),
        ("base parameters", results.get("base_parameters") and f"{results['base_parameters']:,}"),
        ("base dtype", results.get("base_dtype") or base.get("dtype")),
        ("method", method.get("name")),
        ("device", results.get("device")),
        ("training", results.get("train_seconds") and f"{results['train_seconds']:,.1f} s"),
        ("tokens per second", results.get("tokens_per_second") and f"{results['tokens_per_second']:,.0f}"),
        ("peak memory", results.get("peak_memory_bytes") and f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("data, with digests", "\n".join(f"{source} {', '.join(own)}" for source, own in inputs.items())),
    ]
    tokens = [
        [(str(word), number(cosine, ".2f")) for word, cosine in row] for row in results.get("nearest_tokens") or []
    ]
    return {
        "tokens": tokens,
        "prompt": [(name, text) for name, text in prompt if text],
        "environment": [(name, str(value)) for name, value in environment if value],
        "command": results.get("command") or "",
        "settings": json.dumps(config, indent=2, ensure_ascii=False),
    }


def _named(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "all trials"


def _predictions(path: Path, by: str) -> dict[str, list[Prediction]]:
    return dict(read_predictions(path, by)) if path.exists() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of the trials of a sweep."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line)["row"] for line in lines if line]


def _present(parts: Sequence[Any]) -> list[Any]:
    return [part for part in parts if part]
