"""The parts of a report: what is shown, with numbers as text."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.evaluation import metrics
from spt_jax.evaluation.predictions import Prediction

EXAMPLES = 10  # of each kind
LONGEST = 1200  # characters of a text
MATRIX = 20  # classes; with more, only the most frequent confusions are shown
PAIRS = 8
ROWS = 300  # of a table


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number at the head of the report."""

    name: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as markup, its title, and its lines, each with the class of the line and its name."""

    title: str
    svg: str
    keys: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Bar:
    """A score with its interval, on a scale from 0 to 100.

    Attributes:
      name: what has this score.
      value: the score.
      interval: the ends of its interval; empty if there is none.
      ends: the score, and the low and the high end, in percent of the scale.
      chosen: whether it is the prompt that the report is about.
    """

    name: str
    value: str
    interval: str
    ends: tuple[float, float, float]
    chosen: bool = False


@dataclasses.dataclass(frozen=True)
class Bars:
    """Scores on one scale, whose ends are named."""

    title: str
    bars: Sequence[Bar]
    scale: tuple[str, str]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts. The first column names the rows; `left_out` says where rows beyond the first ones are."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of a confusion matrix, its share of the row in percent, and whether it counts right predictions."""

    count: int
    share: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A confusion matrix with the scores of each class.

    Attributes:
      title: whose predictions these are.
      columns: the names of the columns of the matrix; empty if there are too many classes.
      rows: for each class, its name, its cells, and its precision, recall, F1 and number of records.
      pairs: the most frequent confusions: the class, the prediction and how often.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell], Sequence[str]]]
    pairs: Sequence[tuple[str, str, int]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A record: its fields with their texts, the right answer, and the answers of named prompts."""

    fields: Sequence[tuple[str, str]]
    right: str
    answers: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Records of one kind, of which the first are shown. The file `source` has all."""

    title: str
    count: int
    shown: Sequence[Example]
    source: str = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Report:
    """All parts of a report, in the order in which they are shown; empty ones are left out.

    Attributes:
      kind: "training run", "sweep" or "comparison".
      title: the name of the work directory.
      summary: a sentence on the result.
      figures: numbers at the head.
      bars: scores with intervals.
      tables: further tables.
      charts: curves.
      confusions: confusion matrices.
      examples: records that are won, lost or wrong.
      tokens: for each virtual token, the nearest vocabulary entries and their cosines.
      prompt: the names and texts of the template and of hand-written prompts.
      environment: names and values.
      command: the command that made the work directory.
      settings: the config as JSON.
    """

    kind: str
    title: str
    summary: str
    figures: Sequence[Figure]
    bars: Sequence[Bars]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    confusions: Sequence[Confusion]
    examples: Sequence[Examples]
    tokens: Sequence[Sequence[tuple[str, str]]]
    prompt: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    command: str
    settings: str


def number(value: Any, form: str = ".3f") -> str:
    """Returns a number as text; a dash if there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    return format(value, form)


def p_value(value: Any) -> str:
    """Returns a p-value with two significant digits; a dash if there is none."""
    return number(value, ".2g")


def interval_text(ends: Sequence[float] | None) -> str:
    """Returns the ends of an interval in brackets; empty without one."""
    return "" if not ends else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def bars_of(
    title: str, scores: Sequence[tuple[str, float, Sequence[float] | None, bool]], *, share: bool, note: str = ""
) -> Bars | None:
    """Returns scores on one scale; None if none is finite.

    Args:
      title: the title.
      scores: for each bar its name, the score, the ends of its interval if there is one, and whether it is chosen.
      share: whether scores are shares, so that the scale is from 0 to 1.
      note: a remark.
    """
    finite = [own for own in scores if math.isfinite(own[1])]
    if not finite:
        return None
    values = [value for _, score, ends, _ in finite for value in (score, *(ends or ())) if math.isfinite(value)]
    low, high = (0.0, 1.0) if share else _rounded_out(min(values), max(values))

    def place(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    bars = []
    for name, score, ends, chosen in finite:
        low_end, high_end = ends or (score, score)
        bars.append(
            Bar(name, number(score), interval_text(ends), (place(score), place(low_end), place(high_end)), chosen)
        )
    return Bars(title, bars, (f"{low:g}", f"{high:g}"), note)


def _rounded_out(low: float, high: float) -> tuple[float, float]:
    step = 10.0 ** math.floor(math.log10(high - low or abs(high) or 1.0))
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    return round(first, 9), round(last if last > first else first + step, 9)


def confusion_of(title: str, report: Mapping[str, Any] | None) -> Confusion | None:
    """Returns the matrix of a `class_report`; None without one."""
    if not report:
        return None
    names, counts, scores = report["names"], report["confusion"], report["scores"]
    has_others = any(row[-1] for row in counts)
    columns = [*names, *(["no class"] if has_others else [])]
    pairs = [
        (names[i], columns[j], count)
        for i, row in enumerate(counts)
        for j, count in enumerate(row[: len(columns)])
        if i != j and count
    ]
    rows = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = sum(row) or 1
        cells = [Cell(count, round(100 * count / total, 1), i == j) for j, count in enumerate(row[: len(columns)])]
        own = scores[name]
        shown = [*(number(own[field], ".2f") for field in ("precision", "recall", "f1")), str(own["records"])]
        rows.append((name, cells if len(names) <= MATRIX else [], shown))
    pairs.sort(key=lambda pair: -pair[2])
    return Confusion(title, columns if len(names) <= MATRIX else [], rows, pairs[:PAIRS])


def won_and_lost(
    ours: Sequence[Prediction], theirs: Sequence[Prediction], names: tuple[str, str]
) -> list[Examples] | None:
    """Returns the records on which only the first or only the second of two prompts is right.

    Args:
      ours, theirs: predictions for the same records.
      names: the names of the two.

    Returns:
      None if predictions have no right answer, or are not for the same records.
    """
    if len(ours) != len(theirs) or not ours or right_answer(ours[0]) is None:
        return None
    won, lost = [], []
    for own, other in zip(ours, theirs, strict=True):
        if right_answer(own) is None or "prediction" not in other:
            continue
        right = is_right(own), is_right(other)
        if right[0] != right[1]:
            answers = [(name, shown_text(p["prediction"])) for name, p in zip(names, (own, other), strict=True)]
            (won if right[0] else lost).append(_example(own, answers))
    return [
        Examples(f"Won: only {names[0]} is right", len(won), won[:EXAMPLES]),
        Examples(f"Lost: only {names[1]} is right", len(lost), lost[:EXAMPLES]),
    ]


def mistakes(predictions: Sequence[Prediction], name: str, source: str = "predictions.jsonl") -> Examples | None:
    """Returns the records on which a prompt is wrong; None if there is no right answer.

    Args:
      predictions: the predictions.
      name: the name of the prompt.
      source: the file with all predictions.
    """
    answered = [own for own in predictions if right_answer(own) is not None and "prediction" in own]
    if not answered:
        return None
    wrong = [own for own in answered if not is_right(own)]
    shown = [_example(own, [(name, shown_text(own["prediction"]))]) for own in wrong[:EXAMPLES]]
    return Examples(f"Wrong answers of {name}", len(wrong), shown, source)


def _example(prediction: Prediction, answers: Sequence[tuple[str, str]]) -> Example:
    fields = [(name, cut(text)) for name, text in prediction.get("fields", {}).items()]
    return Example(fields, shown_text(right_answer(prediction)), answers)


def right_answer(prediction: Prediction) -> Any:
    """Returns the label or the reference of a prediction; None if it has neither."""
    return prediction.get("label", prediction.get("reference"))


def is_right(prediction: Prediction) -> bool:
    """Returns whether a prediction is its label, or matches its reference as exact match does."""
    if "label" in prediction:
        return prediction["label"] == prediction.get("prediction")
    return bool(metrics.exact_match([prediction["prediction"]], [prediction["reference"]]))


def shown_text(value: Any) -> str:
    """Returns an answer as text; tags are separated by spaces."""
    if isinstance(value, list):
        return cut(" ".join(map(str, value)))
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str) -> str:
    """Returns the beginning of a long text."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
