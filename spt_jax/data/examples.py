"""Records as token ids."""

import array
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from jaxtyping import PyTree

from spt_jax.data.both_sides import decoder_start
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
      second_at: the position of the first id that has the second token type; None if all have the first.
      input_end: how many of the first ids virtual tokens depend on, where they depend on the input. The last id of the
        prompt is not one of them if the base is causal, because a generated answer begins with it.
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
    second_at: int | None = None
    input_end: int | None = None

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

    def reading(self, *, causal: bool) -> "Example":
        """Returns the example with the `input_end` of its whole prompt.

        Args:
          causal: whether the base is causal.

        Raises:
          DataError: the example is a chat with several answers.
        """
        if (answers := np.count_nonzero(self.predicted[1:] > self.predicted[:-1])) > 1:
            raise DataError(
                f"record {self.index + 1}: has {answers} assistant turns; virtual tokens that depend on the input would"
                " read what precedes the first in training, and the whole chat before the last in use; keep one"
            )
        generated = not self.choices and self.reads is None and bool(self.predicted.any())
        end = self.first_target if generated else len(self.ids)
        return dataclasses.replace(self, input_end=end - int(causal))

    def decoded(self, start_id: int) -> "Example":
        """Returns the example for an encoder-decoder, whose decoder reads from the last start token of the prompt.

        Args:
          start_id: the id of the start token.

        Raises:
          DataError: the prompt has none.
        """
        prompt = self.ids if self.reads is not None else self.ids[: self.first_target]
        starts = decoder_start(prompt, start_id)
        if starts is None:
            raise DataError(f"record {self.index + 1}: its prompt lacks the decoder's start token, id {start_id}")
        return dataclasses.replace(self, starts=starts)

    def as_target(self) -> "Example":
        """Returns the example with its correct choice as its only target; unchanged if it has no choices."""
        if not self.choices:
            return self
        right = self.choices[self.label]
        if self.answer_at is not None:
            return dataclasses.replace(self, choices=(right,), label=0)
        predicted = np.arange(len(self.ids) + len(right)) >= len(self.ids)
        return dataclasses.replace(self, ids=np.concatenate([self.ids, right]), predicted=predicted, choices=())


def moved_places(example: Example, kept: np.ndarray) -> dict[str, int | None]:
    """Returns the fields of an example that are positions in its ids, if only some ids are kept.

    Args:
      example: the example.
      kept: whether each id is kept.
    """
    places = {name: getattr(example, name) for name in ("starts", "answer_at", "second_at", "input_end")}
    return {name: None if at is None else int(kept[:at].sum()) for name, at in places.items()}


def empty_extra(examples: Sequence[Example], rows: int, slots: int) -> PyTree[np.ndarray] | None:
    """Returns zeros [rows, slots, ...] for the `extra` of examples.

    Raises:
      DataError: two examples have extras of different structures, shapes or dtypes.
    """
    first = examples[0]
    expected = _extra_kind(first)
    for example in examples:
        found = _extra_kind(example)
        if found != expected:
            raise DataError(
                f"record {example.index + 1}: what the objective prepared is {found}, for record {first.index + 1}"
                f" it is {expected}; all examples need the same structure, shapes and dtypes"
            )
    return jax.tree.map(lambda leaf: np.zeros((rows, slots, *np.shape(leaf)), np.result_type(leaf)), first.extra)


def _extra_kind(example: Example) -> object:
    return jax.tree.map(lambda leaf: (np.shape(leaf), np.result_type(leaf).name), example.extra)


def digest(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 of examples, with which processes check that they read the same data."""
    if isinstance(examples, CompactExamples):
        return examples.digest
    return _digest(examples)


def _digest(examples: Iterable[Example]) -> str:
    sha = hashlib.sha256()
    for example in examples:
        *values, extra = (getattr(example, name) for name in _FIELDS)
        for value in (*values, () if extra is None else tuple(jax.tree.leaves(extra))):
            for part in value if isinstance(value, tuple) else (value,):
                sha.update(b"-" if part is None else np.asarray(part).tobytes())
    return sha.hexdigest()


_FIELDS = [field.name for field in dataclasses.fields(Example)]
_SHARED = 256  # tuples of choices that are kept as objects
_TOGETHER = 1024  # examples that are made at once by an iteration
# Numbers of an example; -1 for None.
_NUMBERS = ("label", "index", "prompt", "starts", "answer_at", "pooled", "second_at", "input_end")
# The fields of `CompactExamples` that hold arrays of examples one after another, and the number of the first of each.
_RAGGED = {"ids": np.int32, "predicted": np.bool_, "reads": np.int32, "classes": np.int32}


class CompactExamples(Sequence[Example]):
    """Examples without `extra` in a few arrays, of 5 bytes for each token and 96 for each example.

    An index returns an `Example` with views of these arrays, a slice a list of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], sha256: str | None = None):
        """Wraps the arrays of `arrays`.

        Args:
          arrays: those of other examples.
          sha256: their `digest`, if it is known.

        Raises:
          ValueError: an array is missing or has another shape.
        """
        self.arrays = dict(arrays)
        count = self._check()
        self._count, self._sha256 = count, sha256
        self._shared: dict[int, tuple[np.ndarray, ...]] = {}

    @staticmethod
    def of(examples: Iterable[Example]) -> "CompactExamples":
        """Returns the examples in compact form; they may be produced one at a time.

        Args:
          examples: the examples, without `extra`.
        """
        ragged = {name: (bytearray(), array.array("q")) for name in _RAGGED}
        numbers = {name: array.array("q") for name in (*_NUMBERS, "choice_set")}
        sets: dict[tuple[bytes, ...], int] = {}
        for example in examples:
            assert example.extra is None
            for name, (content, ends) in ragged.items():
                value = getattr(example, name)
                if value is not None:
                    content += np.asarray(value, _RAGGED[name]).tobytes()
                ends.append(len(content) if value is not None else -1 - len(content))
            for name in _NUMBERS:
                value = getattr(example, name)
                numbers[name].append(-1 if value is None else value)
            key = tuple(np.asarray(choice, np.int32).tobytes() for choice in example.choices)
            numbers["choice_set"].append(sets.setdefault(key, len(sets)))
        arrays: dict[str, np.ndarray] = {name: np.frombuffer(own, np.int64) for name, own in numbers.items()}
        for name, (content, ends) in ragged.items():
            kind = np.dtype(_RAGGED[name])
            own = np.frombuffer(ends, np.int64)
            size = kind.itemsize
            arrays[name] = np.frombuffer(bytes(content), kind)
            arrays[f"{name}_ends"] = np.where(own >= 0, own // size, -1 - (-1 - own) // size)
        flat = [choice for key in sets for choice in key]
        arrays["choice_ids"] = np.frombuffer(b"".join(flat), np.int32)
        arrays["choice_ends"] = np.cumsum([len(choice) // 4 for choice in flat], dtype=np.int64)
        arrays["choice_set_ends"] = np.cumsum([len(key) for key in sets], dtype=np.int64)
        return CompactExamples(arrays)

    def _check(self) -> int:
        counts = {self.arrays[name].size for name in (*_NUMBERS, "choice_set")}
        counts |= {self.arrays[f"{name}_ends"].size for name in _RAGGED}
        missing = {"choice_ids", "choice_ends", "choice_set_ends", *_RAGGED} - self.arrays.keys()
        if missing or len(counts) != 1 or any(own.ndim != 1 for own in self.arrays.values()):
            raise ValueError(f"these are not the arrays of examples: {sorted(self.arrays)}")
        return counts.pop()

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the examples, that of `spt_jax.data.examples.digest`."""
        return self._sha256 or _digest(self)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        at = index % self._count
        return self._between(at, at + 1)[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, self._count, _TOGETHER):
            yield from self._between(start, min(start + _TOGETHER, self._count))

    def _between(self, start: int, stop: int) -> list[Example]:
        """Returns the examples from `start` to before `stop`."""
        label, index, prompt, starts, answers, pooled, seconds, inputs, sets = (
            self.arrays[name][start:stop].tolist() for name in (*_NUMBERS, "choice_set")
        )
        starts, answers, seconds, inputs = (
            [None if value < 0 else value for value in own] for own in (starts, answers, seconds, inputs)
        )
        ids, predicted, reads, classes = (self._parts(name, start, stop) for name in _RAGGED)
        choices = map(self._choices, sets)
        extra = itertools.repeat(None)
        columns = ids, predicted, choices, label, index, prompt, reads, classes, extra, starts, answers
        return list(map(Example, *columns, map(bool, pooled), seconds, inputs))

    def _choices(self, number: int) -> tuple[np.ndarray, ...]:
        """Returns a tuple of choices. Those of classes are shared by all examples, those of pairs by none."""
        if number in self._shared:
            return self._shared[number]
        first, end = (int(self.arrays["choice_set_ends"][n]) if n >= 0 else 0 for n in (number - 1, number))
        edges = [int(self.arrays["choice_ends"][n]) if n >= 0 else 0 for n in range(first - 1, end)]
        found = tuple(self.arrays["choice_ids"][a:b] for a, b in itertools.pairwise(edges))
        if number < _SHARED:
            self._shared[number] = found
        return found

    def _parts(self, name: str, start: int, stop: int) -> list[Any]:
        """Returns the arrays of examples. Their ends are stored; -1 - end for an example that has no such array."""
        values, ends = self.arrays[name], self.arrays[f"{name}_ends"]
        before, found = int(ends[start - 1]) if start else 0, []
        for end in ends[start:stop].tolist():
            found.append(None if end < 0 else values[before if before >= 0 else -1 - before : end])
            before = end
        return found
