"""Results as text."""

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, Mapping[str, Any] | None]
ROWS = {"soft_prompt": "soft prompt", "hard_prompt": "best hand-written prompt", "no_prompt": "no prompt"}


def comparison_table(metrics: Mapping[str, Metrics]) -> str:
    """Returns a table of soft prompt, hand-written prompt and no prompt on test data, or else on validation data."""
    split = "test" if "test" in metrics else "validation"
    if split not in metrics:
        return "no comparison, because there is no validation or test data"
    results = {name: result for name, result in metrics[split].items() if result is not None}
    if any("accuracy" in result for result in results.values()):
        known = ("accuracy", "macro_f1", "entity_f1")
    else:
        known = ("perplexity", "exact_match", "token_f1", "bleu", "rougeL")
    first = next(iter(results.values()))
    columns = [column for column in known if column in first]
    lines = [f"{split:26}" + "".join(f"{column:>22}" for column in columns)]
    for name, result in results.items():
        tasks = {f"  {task}": figures for task, figures in result.get("tasks", {}).items()}
        for label, figures in {ROWS.get(name, name): result, **tasks}.items():
            lines.append(f"{label:26}" + "".join(f"{_cell(figures, column):>22}" for column in columns))
    hard = results.get("hard_prompt")
    if hard is not None:
        lines.append(f"the best hand-written prompt on validation was {hard['text']!r}")
    return "\n".join(lines)


def _cell(result: Mapping[str, Any], column: str) -> str:
    if column not in result:
        return "-"
    interval = result.get(f"{column}_interval")
    return f"{result[column]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def reference_lines(metrics: Metrics) -> dict[str, float]:
    """Returns the scores of the other prompts that the validation curve is compared with."""
    found = {}
    for name in ("hard_prompt", "no_prompt"):
        result = metrics.get(name)
        if result is not None:
            found[ROWS[name]] = result["accuracy" if "accuracy" in result else "loss"]
    return found
