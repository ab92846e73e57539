"""Classification by the probabilities of verbalizers."""

import dataclasses
from typing import ClassVar

import numpy as np

from spt_jax.data.examples import Example
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.data.templates import Template
from spt_jax.data.values import field_text
from spt_jax.errors import DataError, did_you_mean
from spt_jax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Verbalizers(Task):
    """Classification: each class is scored by the probability of its verbalizer."""

    name: ClassVar[str] = "language_model"
    loss: ClassVar[str] = "verbalizers"

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt, and all verbalizers as choices."""
        prompt = encoder.encode_prompt(record, index)
        label = label_of(encoder.template, record, index)
        predicted, at = np.zeros(len(prompt), bool), encoder.form.answer_position(prompt)
        return Example(np.asarray(prompt, np.int32), predicted, encoder.choices, label, index, answer_at=at)

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes accuracy and macro-F1 with bootstrap intervals, and the cross-entropy among the classes."""
        values, classes = np.stack(scores), list(data.encoder.template.verbalizers)
        examples = data.examples
        labels = np.asarray([example.label for example in examples])
        tokens = np.asarray([len(choice) for choice in examples[0].choices]) if examples[0].choices else 1
        predicted = values.argmax(axis=1)
        normalized = (values / tokens).argmax(axis=1)
        highest = values.max(axis=1, keepdims=True)
        log_sum = highest[:, 0] + np.log(np.exp(values - highest).sum(axis=1))
        losses = log_sum - values[np.arange(len(labels)), labels]
        accuracy = metrics.bootstrap_interval((predicted == labels).astype(np.float64))
        f1 = metrics.macro_f1_interval(predicted.tolist(), labels.tolist(), list(range(len(classes))))
        result = {
            "accuracy": accuracy.value,
            "accuracy_interval": accuracy.bounds,
            "accuracy_normalized": float((normalized == labels).mean()),
            "macro_f1": f1.value,
            "macro_f1_interval": f1.bounds,
            "loss": float(losses.mean()),
            "examples": len(labels),
        }
        predictions = [
            {
                "label": classes[right],
                "prediction": classes[guess],
                "log_probabilities": [round(float(s), 5) for s in row],
            }
            for right, guess, row in zip(labels, predicted, values, strict=True)
        ]
        return Evaluation(result, predictions)


def label_of(template: Template, record: Record, index: int) -> int:
    """Returns the number of a record's class.

    Raises:
      DataError: the field is missing, or its class has no verbalizer.
    """
    value, classes = field_text(record, template.label_field or "", index), list(template.verbalizers)
    if value not in classes:
        raise DataError(f"record {index + 1}: label {value!r} has no verbalizer; {did_you_mean(value, classes)}")
    return classes.index(value)
