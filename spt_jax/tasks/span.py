"""The start and the end of an answer within a field."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from spt_jax.data.examples import Example
from spt_jax.data.reading import END, START, answer_text, span_reads
from spt_jax.data.task import EncodedRecords, Evaluation, Record, RecordEncoder, Scores, Task
from spt_jax.data.templates import Template
from spt_jax.data.values import field_of
from spt_jax.errors import DataError
from spt_jax.evaluation import metrics
from spt_jax.evaluation.evaluate import log_softmax
from spt_jax.tasks.tagging import readable_words


@dataclasses.dataclass(frozen=True)
class Span(Task):
    """A head that predicts the start and the end of a substring of the field `reads`."""

    name: ClassVar[str] = "span"
    loss: ClassVar[str] = "span"
    has_head: ClassVar[bool] = True
    outputs: ClassVar[int | None] = 2
    reads_field: ClassVar[bool] = True
    bare: ClassVar[bool] = False

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt; the head reads every token of the field."""
        template = encoder.template
        ids, spans = encoder.encode_read(record, index)
        answer: Any = field_of(record, template.label_field or "", index)
        try:
            reads, classes = span_reads(self.field(template, record, template.reads or "", index), answer, spans)
        except DataError as error:
            raise DataError(f"record {index + 1}: {error}") from error
        return Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), (), 0, index, reads=reads, classes=classes)

    def reference(self, template: Template, record: Record) -> str:
        """Returns the text of the answer."""
        return answer_text(record[template.label_field or ""])

    def with_any_label(self, template: Template, record: Record) -> dict[str, Any]:
        """Returns a record to predict, with the first word as its answer.

        Raises:
          DataError: there are no words.
        """
        return {**record, template.label_field or "": readable_words(self, template, record)[0]}

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes exact match and token F1 of the likeliest span of at most `data.max_new_tokens` tokens."""
        losses, predictions = [], []
        for own, example, record in zip(scores, data.examples, data.records, strict=True):
            start, end = log_softmax(own.T)
            classes = np.asarray(example.classes)
            losses.append(-(start[(classes & START) > 0][0] + end[(classes & END) > 0][0]) / 2)
            places = np.arange(len(start))
            length = places[None, :] - places[:, None] + 1
            together = np.where((length > 0) & (length <= data.max_new_tokens), start[:, None] + end[None, :], -np.inf)
            first, last = np.unravel_index(together.argmax(), together.shape)
            predictions.append(
                {
                    "prediction": data.encoder.read_text(record, int(first), int(last)),
                    "reference": self.reference(data.encoder.template, record),
                    "log_probability": round(float(together.max()), 5),
                }
            )
        texts, references = [p["prediction"] for p in predictions], [p["reference"] for p in predictions]
        matches = metrics.bootstrap_interval(metrics.exact_match_values(texts, references))
        result = {
            "exact_match": matches.value,
            "exact_match_interval": matches.bounds,
            "token_f1": metrics.token_f1(texts, references),
            "loss": float(np.mean(losses)),
            "examples": len(texts),
        }
        return Evaluation(result, predictions)
