"""Plots of runs, sweeps, comparisons and inspections."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.reports.report import curve_metric
from spt_jax.runtime.extras import install_line, installed, load_extra
from spt_jax.runtime.files import write_bytes
from spt_jax.studies.plateau import Estimate

LIGHT, DARK, ACCENT, GREY = "#9bbad9", "#1f4e79", "#b3541e", "#555555"


def can_draw() -> bool:
    """Returns whether matplotlib is installed; without it, the functions of this module raise a `ConfigError`."""
    return installed("matplotlib")


def missing_note(name: str) -> str | None:
    """Returns a note that a plot will not be drawn; None if it can be."""
    if can_draw():
        return None
    return f"note: {name} will not be drawn without matplotlib; to have it: {install_line('matplotlib')}"


def plot_curves(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
    *,
    title: str = "",
    chosen: int | None = None,
) -> None:
    """Draws `curves.png`: the training loss, and the validation metric with other prompts' scores as lines.

    Args:
      path: the PNG to write.
      lines: the contents of `metrics.jsonl`.
      references: values of the validation metric by name, such as the best hand-written prompt's.
      title: the name of the run.
      chosen: the step whose prompt was saved.
    """
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "validation" in line]
    panes = 2 if validation else 1
    figure, axes = _panes(panes)
    left, right = axes[0], axes[-1]
    steps = np.asarray([line["step"] for line in training])
    losses = np.asarray([line["loss"] for line in training])
    left.plot(steps, losses, color=LIGHT, linewidth=0.8, label="each step")
    window = max(1, len(losses) // 50)
    if len(losses) > window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(steps[window - 1 :], smooth, color=DARK, linewidth=1.6, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="training loss", title="Training")
    if validation:
        metric = curve_metric(validation[0]["validation"])
        values = [line["validation"][metric] for line in validation]
        right.plot([line["step"] for line in validation], values, "o-", color=ACCENT, markersize=3, label="soft prompt")
        for (name, value), style in zip(references.items(), ("--", ":", "-."), strict=False):
            right.axhline(value, color=GREY, linewidth=1, linestyle=style, label=f"{name} ({value:.3f})")
        right.set(xlabel="step", ylabel=f"validation {metric}", title="Validation")
        right.set_xlim(*left.get_xlim())
        if metric == "accuracy":
            right.set_ylim(0, 1)
    if chosen is not None:
        for pane in axes:
            pane.axvline(chosen, color=ACCENT, linewidth=1, alpha=0.6, label=f"chosen: step {chosen}")
    locator = load_extra("matplotlib.ticker", path.name).MaxNLocator
    for pane in axes:
        pane.xaxis.set_major_locator(locator(integer=True))
        pane.legend(frameon=False, fontsize="small")
    figure.suptitle(_plain(title))
    _save(figure, path)


def plot_sweep(
    path: Path,
    settings: Sequence[tuple[Mapping[str, str], Estimate, Sequence[float]]],
    chosen: Mapping[str, str],
    measure: str,
    *,
    title: str = "",
    others: Sequence[tuple[Mapping[str, str], float]] = (),
) -> None:
    """Draws `sweep.png`: validation scores against each field of the sweep.

    Args:
      path: the PNG to write.
      settings: for each setting, the values by field, the mean over seeds, and each seed's score.
      chosen: the chosen setting.
      measure: the name of the score.
      title: the name of the sweep.
      others: settings and scores of trials that were stopped early.
    """
    fields = list(settings[0][0]) or ["seeds"]
    figure, panes = _panes(len(fields))
    for pane, field in zip(panes, fields, strict=True):
        every = [*(own for own, _, _ in settings), *(own for own, _ in others)]
        written = [_plain(own.get(field, "all")) for own in every]
        all_places, labels = _places(written)
        places, stopped = all_places[: len(settings)], all_places[len(settings) :]
        if others:
            scores = [value for _, value in others]
            pane.plot(stopped, scores, "x", color=GREY, markersize=4, zorder=1, label="stopped early")
        for place, (_, _, by_seed) in zip(places, settings, strict=True):
            pane.plot([place] * len(by_seed), by_seed, ".", color=LIGHT, zorder=1, label="one seed")
        means = np.asarray([estimate.mean for _, estimate, _ in settings])
        spread = np.abs(np.asarray([estimate.interval for _, estimate, _ in settings]).T - means)
        style = {"fmt": "o", "color": DARK, "markersize": 4, "capsize": 3, "linewidth": 1, "zorder": 2}
        pane.errorbar(places, means, spread, label="mean, 95 % interval", **style)
        best = max((estimate for _, estimate, _ in settings), key=lambda estimate: estimate.mean)
        band = {"color": LIGHT, "alpha": 0.3, "linewidth": 0, "zorder": 0}
        pane.axhspan(best.mean - best.standard_error, best.mean, label="one standard error below the best", **band)
        taken = [own for own, _, _ in settings].index(chosen)
        label = f"chosen: {means[taken]:.3f} with " + _plain(", ".join(chosen.values()))
        pane.plot(places[taken], means[taken], "o", color=ACCENT, markersize=7, zorder=3, label=label)
        pane.set(xlabel=field, ylabel=f"validation {measure}")
        if labels is None and min(all_places) > 0 and max(all_places) / min(all_places) > 30:
            pane.set_xscale("log")
        elif labels is not None or _are_apart(all_places):
            pane.set_xticks(*zip(*(labels or zip(all_places, written, strict=True)), strict=True))
    figure.suptitle(_plain(title))
    handles = dict(zip(*reversed(panes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(fields), frameon=False, fontsize="small"
    )
    _save(figure, path)


def plot_comparison(path: Path, table: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Draws `compare.png`: each row's measure with its interval, and the first row's as a line.

    Args:
      path: the PNG to write.
      table: rows of `comparison.make_table`.
      title: the name of the comparison.
    """
    figure, (pane,) = _panes(1)
    figure.set_size_inches(8, 1.2 + 0.35 * len(table))
    kind = table[0]["measure"]
    values = np.asarray([row[kind] for row in table])
    spread = np.abs(np.asarray([row[f"{kind}_interval"] for row in table]).T - values)
    places = np.arange(len(table))
    style = {"fmt": "none", "ecolor": DARK, "capsize": 3, "linewidth": 1}
    pane.errorbar(values, places, xerr=spread, **style)
    pane.scatter(values, places, color=[ACCENT] + [DARK] * (len(table) - 1), zorder=2)
    pane.axvline(values[0], color=ACCENT, linewidth=0.8, linestyle=":")
    names = [row["name"].replace("\n", "\\n") for row in table]
    short = [_plain(name if len(name) <= 60 else f"{name[:57]}...") for name in names]
    pane.set_yticks(places, short, fontsize="small")
    pane.invert_yaxis()
    pane.set(xlabel=f"test {kind.replace('_', ' ')}, 95 % interval", title=_plain(title))
    _save(figure, path)


def plot_inspection(path: Path, report: Mapping[str, Any]) -> None:
    """Draws `inspect.png`: a pane for each part of the report that exists.

    Args:
      path: the PNG to write.
      report: the contents of `inspect.json`: rows, lost, attention, similarity.
    """
    locator = load_extra("matplotlib.ticker", path.name).MaxNLocator
    rows, lost, attention, similarity = (report.get(name) for name in ("rows", "lost", "attention", "similarity"))
    figure, panes = _panes(sum(map(bool, (rows, lost, attention, similarity))) or 1)
    left = iter(panes)
    if rows:
        pane, places = next(left), range(len(rows))
        pane.bar(places, [row["norm"] for row in rows], color=LIGHT, label="norm")
        if rows[0]["drift"] is not None:
            pane.plot(places, [row["drift"] for row in rows], "o", color=ACCENT, markersize=4, label="drift from start")
        pane.set(xlabel="virtual token", ylabel="multiples of the vocabulary's median norm", title="Norms")
        pane.xaxis.set_major_locator(locator(integer=True))
        pane.legend(frameon=False, fontsize="small")
    if lost:
        pane = next(left)
        values = np.asarray([loss["interval"]["value"] for loss in lost])
        ends = np.asarray([[loss["interval"]["low"], loss["interval"]["high"]] for loss in lost]).T
        pane.errorbar(range(len(lost)), values, np.abs(ends - values), fmt="o", color=DARK, markersize=4, linewidth=1)
        pane.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        measure = report["measure"].replace("_", " ")
        pane.set(xlabel="ablated position", ylabel=f"{measure} lost, 95 % interval", title="Ablation")
    if attention:
        pane = next(left)
        image = pane.imshow(np.asarray(attention["by_layer_and_position"]), aspect="auto", cmap="Blues")
        figure.colorbar(image, ax=pane)
        pane.set(xlabel="position", ylabel="layer", title="Attention of the last token")
        pane.xaxis.set_major_locator(locator(integer=True))
        pane.yaxis.set_major_locator(locator(integer=True))
    if similarity:
        pane, names = next(left), [_plain(Path(name).parent.name or name) for name in similarity["prompts"]]
        image = pane.imshow(np.asarray(similarity["cosines"]), cmap="RdBu_r", vmin=-1, vmax=1)
        figure.colorbar(image, ax=pane)
        pane.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
        pane.set_yticks(range(len(names)), names, fontsize="small")
        pane.set(title="Cosines between prompts")
    _save(figure, path)


def plot_range_test(
    path: Path,
    rates: Float[np.ndarray, " N"],
    losses: Float[np.ndarray, " N"],
    smoothed: Float[np.ndarray, " N"],
    suggested: float,
) -> None:
    """Draws `rates.png`: the loss against the increasing learning rate, and the suggested rate."""
    figure, (pane,) = _panes(1)
    pane.plot(rates, losses, color=LIGHT, linewidth=0.8, label="each step")
    pane.plot(rates, smoothed, color=DARK, label="smoothed")
    pane.axvline(suggested, color=ACCENT, linestyle="--", label=f"suggested: {suggested:.2g}")
    pane.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    pane.legend(frameon=False, fontsize="small")
    _save(figure, path)


def _places(written: Sequence[str]) -> tuple[list[float], list[tuple[int, str]] | None]:
    """Returns the positions of values on an axis; values that are not all numbers are evenly spaced, with labels."""
    try:
        return [float(value) for value in written], None
    except ValueError:
        order = list(dict.fromkeys(written))
        return [float(order.index(value)) for value in written], list(enumerate(order))


def _are_apart(places: Sequence[float]) -> bool:
    """Whether there are few positions, and the labels of any two have room side by side."""
    ordered = sorted(set(places))
    gaps = [after - before for before, after in itertools.pairwise(ordered)]
    return len(ordered) <= 12 and all(gap >= 0.05 * (ordered[-1] - ordered[0]) for gap in gaps)


def _plain(text: str) -> str:
    """Escapes dollar signs, which matplotlib would read as formulas."""
    return text.replace("$", r"\$")


def _panes(count: int) -> tuple[Any, list[Any]]:
    """Returns a figure with `count` panes side by side."""
    figure = load_extra("matplotlib.figure", "a plot").Figure(figsize=(4.5 * count, 3.6), layout="constrained")
    load_extra("matplotlib.backends.backend_agg", "a plot").FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG atomically."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_bytes(path, buffer.getvalue())
