"""Predictions for each record as lines of JSON, from which every metric can be recomputed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.errors import DataError
from spt_jax.evaluation import metrics

Prediction = Mapping[str, Any]

# Each measure of predictions, and the field that must be present to compute it.
SHOWN_BY = {"accuracy": "label", "log_probability": "tokens", "exact_match": "reference", "reward": "reward"}
# The measure by which systems are compared: the first of these that they have.
PREFERRED = ("accuracy", "exact_match", "log_probability")
Values = Float[np.ndarray, " N"]


def predictions_jsonl(results: Mapping[str, Sequence[Prediction]], by: str = "prompt") -> str:
    """Formats predictions as JSON lines, one per record and result, with the name of the result in the field `by`."""
    lines = []
    for name, predictions in results.items():
        for number, prediction in enumerate(predictions):
            lines.append(json.dumps({by: name, "record": number + 1, **prediction}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def with_fields(
    predictions: Sequence[Prediction], records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Adds to each prediction, as "fields", the texts of its record.

    Args:
      predictions: one per record.
      records: the records.
      names: the fields to add. Values that are not text are written as JSON.
    """
    return [
        {"fields": {name: _text(record[name]) for name in names if name in record}, **prediction}
        for prediction, record in zip(predictions, records, strict=True)
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Returns the value of a numpy array or number in Python's types; the text of anything else."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def read_predictions(path: Path, by: str = "prompt") -> dict[str, list[dict[str, Any]]]:
    """Reads the predictions of each result from such a file, in the order of the records.

    Raises:
      DataError: a line is not JSON, or lacks `by` or "record".
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            prediction = json.loads(line)
            found.setdefault(prediction.pop(by), []).append(prediction)
            int(prediction["record"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a prediction with {by!r} and 'record': {error}") from error
    ordered = {name: sorted(lines, key=lambda prediction: int(prediction["record"])) for name, lines in found.items()}
    return {name: [{k: v for k, v in p.items() if k != "record"} for p in lines] for name, lines in ordered.items()}


def measures(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """Returns the measures that `record_values` can compute from these predictions."""
    return tuple(name for name, field in SHOWN_BY.items() if predictions and field in predictions[0])


def record_values(predictions: Sequence[Prediction], measure: str) -> Float[np.ndarray, " N"]:
    """Returns one value per record, higher for better ones, whose mean is the measure over all records.

    If each word has a class, accuracy is that over words. The log-probability is per token, so its mean is minus the
    loss. Exact match covers only the records for which an answer was generated. An answer that a reward function failed
    for counts as the mean of the others, and as 0 if there are none.
    """
    if measure == "reward":
        rewards = np.asarray([np.nan if p["reward"] is None else p["reward"] for p in predictions], float)
        known = rewards[np.isfinite(rewards)]
        return np.where(np.isfinite(rewards), rewards, known.mean() if len(known) else 0.0)
    if measure == "accuracy":
        pairs = [(_listed(p["label"]), _listed(p["prediction"])) for p in predictions]
        right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs]
        return _ratio_values(right, [len(labels) for labels, _ in pairs])
    if measure == "exact_match":
        answered = [p for p in predictions if "reference" in p]
        return metrics.exact_match_values([p["prediction"] for p in answered], [p["reference"] for p in answered])
    return _ratio_values([p["log_probability"] for p in predictions], [p["tokens"] for p in predictions])


def _ratio_values(sums: Sequence[float | int], counts: Sequence[int]) -> Float[np.ndarray, " N"]:
    """Returns values whose mean is the ratio of the totals, and whose variance is that of the ratio, to first order.

    A record's length changes the sum and the count together, and therefore hardly their ratio (Cochran 1977, section
    2.11).
    """
    total, size = np.asarray(sums, float), np.asarray(counts, float)
    if (size == 1).all():
        return total
    ratio = total.sum() / size.sum()
    return ratio + (total - ratio * size) * len(size) / size.sum()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def advantage(ours: Values, theirs: Values) -> dict[str, Any]:
    """Compares two systems by their values on the same records, from `record_values`.

    Returns:
      "ahead", the difference of the means, with "ahead_interval" and "p_bootstrap" of the paired bootstrap; and, if all
      values are 0 or 1, "p_mcnemar".
    """
    difference = metrics.paired_bootstrap(ours, theirs)
    interval = difference.interval
    found: dict[str, Any] = {"ahead": interval.value, "ahead_interval": [interval.low, interval.high]}
    found["p_bootstrap"] = difference.p
    if set(ours) | set(theirs) <= {0.0, 1.0}:
        found["p_mcnemar"] = metrics.mcnemar(ours, theirs)
    return found


def compared(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> dict[str, Any] | None:
    """Returns "measure" and the `advantage` of predictions over others of the same records.

    The measure is accuracy, or else exact match, or else log-probability; without one in common, the result is None.
    """
    common = [name for name in PREFERRED if name in measures(ours) and name in measures(theirs)]
    if not common:
        return None
    return {"measure": common[0], **advantage(*(record_values(own, common[0]) for own in (ours, theirs)))}
