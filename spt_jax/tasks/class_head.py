"""Classification by a head: at the last token of the prompt, or where the heads of an encoder read."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from spt_jax.data.examples import Example
from spt_jax.data.task import Record, RecordEncoder
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import log_softmax
from spt_jax.tasks.verbalizers import Verbalizers, label_of


@dataclasses.dataclass(frozen=True)
class ClassHead(Verbalizers):
    """Classification by a head; the verbalizers only name its classes."""

    name: ClassVar[str] = "classification"
    loss: ClassVar[str] = "vocabulary"
    has_head: ClassVar[bool] = True

    def check(self, template: Template) -> None:
        """Checks that there are classes, and no field to read.

        Raises:
          ConfigError: there are fewer than 2 classes, or there is such a field.
        """
        if len(template.verbalizers) < 2:
            raise ConfigError("a classification head needs at least 2 verbalizers, whose names are the classes")
        super().check(template)

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes the prompt; the head reads what is the base's `Layout.pooling`."""
        ids = np.asarray(encoder.encode_prompt(record, index), np.int32)
        label = label_of(encoder.template, record, index)
        form, classes = encoder.form, np.asarray([label], np.int32)
        reads = np.asarray([form.class_position(ids)], np.int32)
        head = {"reads": reads, "classes": classes, "pooled": form.pooled}
        return Example(ids, np.zeros(len(ids), bool), (), label, index, **head)

    def class_scores(self, scores: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
        """Returns the log-probabilities of the classes, given the head's logits."""
        return log_softmax(scores)
