"""Records as token ids."""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from spt_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as token ids.

    Attributes:
      ids: the prompt, followed by the target if it is generated text (no choices).
      predicted: True for the ids that the model learns to predict.
      choices: for classification, the ids of each verbalizer, each a continuation of `ids`.
      label: the index of the correct choice; 0 if there are no choices.
      index: the record's number in its source, from 0.
      prompt: the index of its soft prompt, if there are several.
      reads: for a task head, the positions of the hidden states that it reads, ascending.
      classes: the correct class at each of these positions.
      extra: what `Objective.prepare` returned for this example.
      starts: of an encoder-decoder, the position in `ids` of the first token that the decoder reads.
      answer_at: the position of the mask token that the choices replace, each of one token; None if they follow `ids`.
      pooled: whether a task head reads the mean of the hidden states of the real ids, instead of one at `reads`.
    """

    ids: np.ndarray
    predicted: np.ndarray
    choices: tuple[np.ndarray, ...]
    label: int
    index: int
    prompt: int = 0
    reads: np.ndarray | None = None
    classes: np.ndarray | None = None
    extra: PyTree[np.ndarray] | None = None
    starts: int | None = None
    answer_at: int | None = None
    pooled: bool = False

    @property
    def length(self) -> int:
        """The number of tokens of the longest sequence: the ids and the longest choice."""
        if self.answer_at is not None:
            return len(self.ids)
        return len(self.ids) + max((len(choice) for choice in self.choices), default=0)

    @property
    def first_target(self) -> int:
        """The position after the first token from whose hidden state something is predicted."""
        if self.reads is not None:
            return int(self.reads[0]) + 1
        if self.answer_at is not None:
            return self.answer_at + 1
        return len(self.ids) if self.choices else int(np.argmax(self.predicted))

    def decoded(self) -> "Example":
        """Returns the example for an encoder-decoder: the last token of its prompt is the decoder's first one."""
        last = len(self.ids) if self.reads is not None else self.first_target
        return dataclasses.replace(self, starts=last - 1)

    def as_target(self) -> "Example":
        """Returns the example with its correct choice as its only target; unchanged if it has no choices."""
        if not self.choices:
            return self
        right = self.choices[self.label]
        if self.answer_at is not None:
            return dataclasses.replace(self, choices=(right,), label=0)
        predicted = np.arange(len(self.ids) + len(right)) >= len(self.ids)
        return dataclasses.replace(self, ids=np.concatenate([self.ids, right]), predicted=predicted, choices=())


def empty_extra(examples: Sequence[Example], rows: int, slots: int) -> PyTree[np.ndarray] | None:
    """Returns zeros [rows, slots, ...] for the `extra` of examples.

    Raises:
      DataError: two examples have extras of different structures, shapes or dtypes.
    """

    def kind(example: Example) -> PyTree[tuple[tuple[int, ...], str]]:
        return jax.tree.map(lambda leaf: (np.shape(leaf), np.result_type(leaf).name), example.extra)

    first = examples[0]
    for example in examples:
        if kind(example) != kind(first):
            raise DataError(
                f"record {example.index + 1}: what the objective prepared is {kind(example)}, for record"
                f" {first.index + 1} it is {kind(first)}; all examples need the same structure, shapes and dtypes"
            )
    return jax.tree.map(lambda leaf: np.zeros((rows, slots, *np.shape(leaf)), np.result_type(leaf)), first.extra)


def digest(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of examples, with which processes check that they read the same data."""
    sha = hashlib.sha256()
    for example in examples:
        *values, extra = (getattr(example, field.name) for field in dataclasses.fields(example))
        for value in (*values, tuple(jax.tree.leaves(extra))):
            for part in value if isinstance(value, tuple) else (value,):
                sha.update(b"-" if part is None else np.asarray(part).tobytes())
    return sha.hexdigest()
