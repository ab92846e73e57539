"""Results as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.reports.tables import text_table

Metrics = Mapping[str, Mapping[str, Any] | None]
ROWS = {
    "soft_prompt": "soft prompt",
    "hard_prompt": "best hand-written prompt",
    "no_prompt": "no prompt",
    "with_text": "the text itself",
}


def comparison_table(metrics: Mapping[str, Metrics]) -> str:
    """Returns a table of soft prompt, hand-written prompt and no prompt on test data, or else on validation data."""
    split = "test" if "test" in metrics else "validation"
    if split not in metrics:
        return "no comparison, because there is no validation or test data"
    results = {name: result for name, result in metrics[split].items() if result is not None}
    first = next(iter(results.values()))
    if any("win_rate" in result for result in results.values()):
        known = ("win_rate", "accuracy", "reward_margin", "kl_to_base")
    elif any("reward" in result for result in results.values()):
        known = ("reward", "completion_length")
    elif any("accuracy" in result for result in results.values()):
        known = ("accuracy", "macro_f1", "entity_f1")
    else:
        known = ("perplexity", "exact_match", "token_f1", "bleu", "rougeL")
    known = (*known, *(("class_agreement",) if "class_agreement" in first else ("agreement",)), "kl_to_text")
    columns = [column for column in known if column in first]
    rows = []
    for name, result in results.items():
        tasks = {f"  {task}": figures for task, figures in result.get("tasks", {}).items()}
        for label, figures in {ROWS.get(name, name): result, **tasks}.items():
            rows.append([label, *(_cell(figures, column) for column in columns)])
    lines = [text_table([split, *columns], rows)]
    hard = results.get("hard_prompt")
    if hard is not None:
        lines.append(f"the best hand-written prompt on validation was {hard['text']!r}")
    return "\n".join(lines)


def compact_table(table: Sequence[Mapping[str, Any]]) -> str:
    """Returns the main columns of the table of `spt-jax compare`; `compare.md` has all.

    Args:
      table: the rows, as in `compare.json`.
    """
    kind = table[0]["measure"]
    header = ["", kind.replace("_", " "), "first is\nahead by", "p", "trained", "bytes", "extra\ntokens"]
    rows = [
        [
            row["name"].replace("\n", "\\n"),
            _cell(row, kind, "\n"),
            _cell(row, "ahead", "\n"),
            next((f"{row[p]:.1g}" for p in ("p_mcnemar", "p_bootstrap") if p in row), "-"),
            *(_count(row[name], ",") for name in ("trainable_parameters", "bytes")),
            _count(row["extra_tokens"], ",.1f"),
        ]
        for row in table
    ]
    return text_table(header, rows)


def _count(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cell(result: Mapping[str, Any], column: str, between: str = " ") -> str:
    if column not in result:
        return "-"
    interval = result.get(f"{column}_interval")
    return f"{result[column]:.3f}" + (f"{between}[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def curve_metric(result: Mapping[str, Any]) -> str:
    """Returns the name of the metric that curves of the validation show: reward, accuracy or loss."""
    return next((name for name in ("reward", "accuracy") if name in result), "loss")


def reference_lines(metrics: Metrics) -> dict[str, float]:
    """Returns the scores of the other prompts that the validation curve is compared with."""
    found = {}
    for name in ("hard_prompt", "no_prompt"):
        result = metrics.get(name)
        if result is not None:
            found[ROWS[name]] = result[curve_metric(result)]
    return found
