"""What was predicted for every record, as lines of JSON from which every metric can be computed again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax import metrics

Prediction = Mapping[str, Any]


def predictions_jsonl(results: Mapping[str, Sequence[Prediction]], by: str = "prompt") -> str:
    """A line per record and result, which says in the field `by` which result it belongs to."""
    lines = []
    for name, predictions in results.items():
        for number, prediction in enumerate(predictions):
            lines.append(json.dumps({by: name, "record": number + 1, **prediction}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def read_predictions(path: Path, by: str = "prompt") -> dict[str, list[dict[str, Any]]]:
    """The predictions of every result in such a file, in the records' order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        prediction = json.loads(line)
        del prediction["record"]
        found.setdefault(prediction.pop(by), []).append(prediction)
    return found


def measures(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """What `record_values` can say of them: of classes, of targets, of answers."""
    fields = {"accuracy": "label", "log_probability": "tokens", "exact_match": "reference"}
    return tuple(name for name, field in fields.items() if field in predictions[0])


def record_values(predictions: Sequence[Prediction], measure: str) -> Float[np.ndarray, " N"]:
    """One value per record, higher where it went better, whose mean is that of all.

    Accuracy is that of words where every word has a class. The log-probability is per token, so that its mean is minus
    the loss. Exact matches are of the first records alone if no more were generated.
    """
    if measure == "accuracy":
        pairs = [(_listed(p["label"]), _listed(p["prediction"])) for p in predictions]
        right = np.asarray([sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairs], float)
        return right * len(pairs) / sum(len(labels) for labels, _ in pairs)
    if measure == "exact_match":
        answered = [p for p in predictions if "reference" in p]
        return metrics.exact_match_values([p["prediction"] for p in answered], [p["reference"] for p in answered])
    tokens = np.asarray([p["tokens"] for p in predictions], float)
    return np.asarray([p["log_probability"] for p in predictions]) * len(tokens) / tokens.sum()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
