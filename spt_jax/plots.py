"""The picture of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_curves(path: Path, lines: Sequence[Mapping[str, Any]], references: Mapping[str, float]) -> None:
    """Draws `curves.png`: training loss, and the validation metric with the scores of other prompts as lines.

    Args:
      path: the PNG to write.
      lines: the contents of `metrics.jsonl`.
      references: name -> value of the validation metric, such as the best hand-written prompt's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation" in line]
    panes = 2 if validation else 1
    figure = Figure(figsize=(4.5 * panes, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, panes, squeeze=False)[0][[0, -1]]
    steps = np.asarray([line["step"] for line in training])
    losses = np.asarray([line["loss"] for line in training])
    left.plot(steps, losses, color="#9bbad9", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 50)
    if len(losses) > window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(steps[window - 1 :], smooth, color="#1f4e79", linewidth=1.6, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss", title="Training")
    left.legend(frameon=False)
    if validation:
        metric = "accuracy" if "accuracy" in validation[0]["validation"] else "loss"
        values = [line["validation"][metric] for line in validation]
        right.plot(
            [line["step"] for line in validation], values, "o-", color="#b3541e", markersize=3, label="soft prompt"
        )
        for (name, value), style in zip(references.items(), ("--", ":", "-."), strict=False):
            right.axhline(value, color="#555555", linewidth=1, linestyle=style, label=f"{name} ({value:.3f})")
        right.set(xlabel="step", ylabel=f"validation {metric}", title="Validation")
        if metric == "accuracy":
            right.set_ylim(0, 1)
        right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
