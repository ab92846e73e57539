"""How well each class is predicted, computed from predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.evaluation import metrics
from spt_jax.evaluation.predictions import Prediction


def class_report(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, Any] | None:
    """Returns the confusion matrix and the scores of each class; where each word has a class, over words.

    Args:
      predictions: one per record, with "label" and "prediction".
      classes: the names of the classes, in the order of the matrix.

    Returns:
      "names"; "confusion", for each class (row) how often it was predicted as each class (column), with a last column
      for predictions that are no class; and "scores", for each class its precision, recall and F1 (0 where it was
      never predicted or never occurs) and its number of records. None if predictions have no classes, or labels that
      are not among `classes`.
    """
    if not predictions or not classes or any("label" not in own for own in predictions):
        return None
    labels, guesses = _flat(predictions, "label"), _flat(predictions, "prediction")
    if not labels or not set(labels) <= set(classes):
        return None
    counts = metrics.confusion_counts(guesses, labels, classes)
    return {"names": list(classes), "confusion": counts.tolist(), "scores": class_scores(counts, classes)}


def class_scores(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Mapping[str, float | int]]:
    """Returns precision, recall, F1 and the number of records of each class.

    Args:
      counts: the counts [C, C + 1] of `metrics.confusion_counts`.
      classes: the C names.
    """
    size = len(classes)
    hits, records, predicted = np.diagonal(counts), counts.sum(1), counts[:, :size].sum(0)
    return {
        name: {
            "precision": float(hits[i] / max(predicted[i], 1)),
            "recall": float(hits[i] / max(records[i], 1)),
            "f1": float(2 * hits[i] / max(records[i] + predicted[i], 1)),
            "records": int(records[i]),
        }
        for i, name in enumerate(classes)
    }


def _flat(predictions: Sequence[Prediction], field: str) -> list[Any]:
    values = [own[field] for own in predictions]
    return [tag for own in values for tag in own] if isinstance(values[0], list) else values


def class_agreement(scores: Float[np.ndarray, "N C"], others: Float[np.ndarray, "N C"]) -> dict[str, float]:
    """Compares the distributions over the classes of two classifiers.

    Args:
      scores: the log-probability of each class of each record, up to a constant of the record.
      others: those that they are compared with.

    Returns:
      "class_agreement", the share of records with the same most probable class, and "class_kl", the mean over the
      records of KL(p || q) in nats, where p and q are the softmax of `others` and of `scores`.
    """
    both = (own.astype(np.float64) for own in (others, scores))
    log_p, log_q = (own - np.logaddexp.reduce(own, axis=-1, keepdims=True) for own in both)
    return {
        "class_agreement": float(np.mean(scores.argmax(-1) == others.argmax(-1))),
        "class_kl": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
    }
