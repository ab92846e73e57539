"""A record as token ids."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as ids.

    ids: the prompt, and for a generation target (no choices) the target after it.
    predicted: True for those ids that the model shall predict.
    choices: for classification, the ids of every verbalizer, each a continuation of `ids`.
    label: the index of the right choice, 0 where there is none.
    index: the record's number in its source.
    prompt: which of several soft prompts it is for.
    reads: for a task head, the positions whose hidden states it reads, ascending.
    classes: the right class at each of them.
    """

    ids: np.ndarray
    predicted: np.ndarray
    choices: tuple[np.ndarray, ...]
    label: int
    index: int
    prompt: int = 0
    reads: np.ndarray | None = None
    classes: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sequence: the context and its longest continuation."""
        return len(self.ids) + max((len(choice) for choice in self.choices), default=0)

    @property
    def first_target(self) -> int:
        """The position after the first token whose hidden state is needed."""
        if self.reads is not None:
            return int(self.reads[0]) + 1
        return len(self.ids) if self.choices else int(np.argmax(self.predicted))

    def as_target(self) -> "Example":
        """The same example with the right choice, if it has choices, as its one target."""
        if not self.choices:
            return self
        right = self.choices[self.label]
        predicted = np.arange(len(self.ids) + len(right)) >= len(self.ids)
        return dataclasses.replace(self, ids=np.concatenate([self.ids, right]), predicted=predicted, choices=())


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of examples, by which two processes tell that they read the same."""
    sha = hashlib.sha256()
    for example in examples:
        for value in dataclasses.astuple(example):
            for part in value if isinstance(value, tuple) else (value,):
                sha.update(b"-" if part is None else np.asarray(part).tobytes())
    return sha.hexdigest()
