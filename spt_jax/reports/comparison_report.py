"""The report of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.evaluation.metrics import SHARES
from spt_jax.reports.contents import (
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
from spt_jax.reports.shared import (
    difference_sentence,
    parameters_note,
    predictions_by,
    present,
    shared_parts,
    words,
    written_figures,
)
from spt_jax.studies.comparison import PREDICTIONS_FILE


def comparison_report(workdir: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> Report:
    table: Sequence[Mapping[str, Any]] = results["table"]
    first, measure = table[0], table[0]["measure"]
    bars = bars_of(
        f"{words(measure)} on {first['records']} test records, 95\u00a0% interval".capitalize(),
        [(own["name"], own[measure], own.get(f"{measure}_interval"), own is first) for own in table],
        share=measure in SHARES,
    )
    predictions = predictions_by(workdir / PREDICTIONS_FILE, "prompt")
    written = [own for own in table[1:] if own["name"].startswith("hand-written: ")]
    others = written or [own for own in table[1:] if own["name"] == "no prompt"] or table
    best = max(others, key=lambda own: own[measure])
    ours = predictions.get(first["name"], [])
    names = "the soft prompt", "the written prompt" if written else best["name"]
    examples = None if best is first else won_and_lost(ours, predictions.get(best["name"], []), names)
    figures = [Figure(words(measure), number(first[measure]), interval_text(first.get(f"{measure}_interval")))]
    if written:
        figures += written_figures(best, measure, best)
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
        summary=difference_sentence({**best, "measure": measure}) if written else "",
        figures=[*figures, Figure("size", f"{number(first.get('bytes'), ',d')} B", parameters_note(first))],
        bars=present([bars]),
        tables=[
            Table(
                "Differences and costs",
                ["", *(name for name, _ in columns)],
                [[cut(own["name"]), *(text(own) for _, text in columns)] for own in table],
            )
        ],
        charts=[],
        confusions=present(
            [confusion_of(f"Classes, {first['name']}", (results.get("classes") or {}).get(first["name"]))]
        ),
        examples=present([mistakes(ours, "the soft prompt")]) if examples is None else examples,
        **shared_parts(config, results, [best["name"].removeprefix("hand-written: ")] if written else []),
    )
