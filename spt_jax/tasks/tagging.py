"""A tag for each word of a field."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from spt_jax.data.examples import Example
from spt_jax.data.reading import tag_reads, words_of
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.data.templates import Template
from spt_jax.data.values import field_of, field_text
from spt_jax.errors import DataError
from spt_jax.evaluation import metrics
from spt_jax.evaluation.evaluate import log_softmax


@dataclasses.dataclass(frozen=True)
class Tagging(Task):
    """A head that predicts a class for each word of the field `reads`; the verbalizers only name the classes."""

    name: ClassVar[str] = "tagging"
    has_head: ClassVar[bool] = True
    reads_field: ClassVar[bool] = True
    bare: ClassVar[bool] = False

    def classes(self, template: Template, records: Sequence[Record]) -> Mapping[str, str]:
        """Returns the tags of the records, unless the template names them.

        Raises:
          DataError: the tags of a record are not words.
        """
        if template.verbalizers:
            return template.verbalizers
        label = template.label_field or ""
        where = ((record, f"record {number}: the field {label!r}") for number, record in enumerate(records, 1))
        tags = sorted({tag for record, what in where for tag in words_of(record[label], what)})
        return {tag: tag for tag in tags}

    def field(self, template: Template, record: Record, name: str, index: int) -> str:
        """Returns the text of a field; the words of the field that is read are separated by single spaces."""
        return " ".join(_words(record, name, index)) if name == template.reads else field_text(record, name, index)

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt; the head reads a token of each word, the last or, with an encoder, the first."""
        template = encoder.template
        ids, spans = encoder.encode_read(record, index)
        tags = _words(record, template.label_field or "", index)
        words = _words(record, template.reads or "", index)
        try:
            names, causal = list(template.verbalizers), encoder.form.causal
            reads, classes = tag_reads(words, tags, names, spans, causal=causal)
        except DataError as error:
            raise DataError(f"record {index + 1}: {error}") from error
        return Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), (), 0, index, reads=reads, classes=classes)

    def with_any_label(self, template: Template, record: Record) -> dict[str, Any]:
        """Returns a record to predict, with arbitrary tags.

        Raises:
          DataError: there are no words.
        """
        words = readable_words(self, template, record)
        return {**record, template.label_field or "": list(template.verbalizers)[:1] * len(words)}

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes accuracy and macro-F1 over words and, for tags such as B-X, I-X and O, F1 over whole entities."""
        names = list(data.encoder.template.verbalizers)
        labels = [np.asarray(example.classes) for example in data.examples]
        guesses = [own.argmax(axis=-1) for own in scores]
        flat_labels, flat_guesses = np.concatenate(labels), np.concatenate(guesses)
        losses = -log_softmax(np.concatenate(scores))[np.arange(len(flat_labels)), flat_labels]
        accuracy = metrics.bootstrap_interval((flat_labels == flat_guesses).astype(np.float64))
        tags = [[[names[c] for c in own] for own in side] for side in (guesses, labels)]
        result: dict[str, Any] = {
            "accuracy": accuracy.value,
            "accuracy_interval": accuracy.bounds,
            "macro_f1": metrics.macro_f1(flat_guesses.tolist(), flat_labels.tolist(), list(range(len(names)))),
            **({"entity_f1": metrics.entity_f1(*tags)} if metrics.has_entities(names) else {}),
            "loss": float(losses.mean()),
            "examples": len(labels),
            "words": len(flat_labels),
        }
        return Evaluation(result, [{"label": right, "prediction": guess} for guess, right in zip(*tags, strict=True)])


def readable_words(task: Task, template: Template, record: Record) -> list[str]:
    """Returns the words of the field that a head reads.

    Raises:
      DataError: there are none.
    """
    name = template.reads or ""
    words = task.field(template, record, name, 0).split()
    if not words:
        raise DataError(f"the field {name!r} is empty, so there is nothing to read")
    return words


def _words(record: Record, name: str, index: int) -> list[str]:
    return words_of(field_of(record, name, index), f"record {index + 1}: the field {name!r}")
