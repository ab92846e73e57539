"""What was predicted for every record, as lines of JSON from which every metric can be computed again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.errors import DataError
from spt_jax.evaluation import metrics

Prediction = Mapping[str, Any]

# Every measure of predictions, and the field whose presence says that it can be computed.
SHOWN_BY = {"accuracy": "label", "log_probability": "tokens", "exact_match": "reference"}


def predictions_jsonl(results: Mapping[str, Sequence[Prediction]], by: str = "prompt") -> str:
    """A line per record and result, which says in the field `by` which result it belongs to."""
    lines = []
    for name, predictions in results.items():
        for number, prediction in enumerate(predictions):
            lines.append(json.dumps({by: name, "record": number + 1, **prediction}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def read_predictions(path: Path, by: str = "prompt") -> dict[str, list[dict[str, Any]]]:
    """The predictions of every result in such a file, in the records' order.

    Raises:
      DataError: a line is no JSON, or lacks `by` or "record".
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
            raise DataError(f"{path}, line {number}: no prediction with {by!r} and 'record': {error}") from error
    ordered = {name: sorted(own, key=lambda prediction: int(prediction["record"])) for name, own in found.items()}
    return {name: [{k: v for k, v in p.items() if k != "record"} for p in own] for name, own in ordered.items()}


def measures(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """What `record_values` can say of them: of classes, of targets, of answers."""
    return tuple(name for name, field in SHOWN_BY.items() if predictions and field in predictions[0])


def record_values(predictions: Sequence[Prediction], measure: str) -> Float[np.ndarray, " N"]:
    """One value per record, higher where it went better, whose mean is that of all.

    Accuracy is that of words where every word has a class. The log-probability is per token, so that its mean is minus
    the loss. Exact matches are of the first records alone if no more were generated.
    """
    if measure == "accuracy":
        pairs = [(_listed(p["label"]), _listed(p["prediction"])) for p in predictions]
        right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs]
        return _ratio_values(right, [len(labels) for labels, _ in pairs])
    if measure == "exact_match":
        answered = [p for p in predictions if "reference" in p]
        return metrics.exact_match_values([p["prediction"] for p in answered], [p["reference"] for p in answered])
    return _ratio_values([p["log_probability"] for p in predictions], [p["tokens"] for p in predictions])


def _ratio_values(sums: Sequence[float | int], counts: Sequence[int]) -> Float[np.ndarray, " N"]:
    """Values whose mean is the ratio of the totals and whose spread is that of the ratio, to first order.

    The length of a record moves the sum and the count together, and so hardly their ratio: Cochran 1977, section 2.11.
    """
    total, size = np.asarray(sums, float), np.asarray(counts, float)
    if (size == 1).all():
        return total
    ratio = total.sum() / size.sum()
    return ratio + (total - ratio * size) * len(size) / size.sum()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
