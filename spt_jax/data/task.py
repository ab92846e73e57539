"""What a task is: what is predicted for a record, how it is encoded, and how predictions are evaluated."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.examples import Example
from spt_jax.data.preferences import PairScores
from spt_jax.data.reading import Spans
from spt_jax.data.sequences import SequenceForm, form_of
from spt_jax.data.templates import TEMPLATE_TASKS, Field, Template, parse
from spt_jax.data.values import field_text
from spt_jax.errors import ConfigError, DataError, did_you_mean

Record = Mapping[str, Any]
Scores = Sequence[Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
      metrics: the metrics by name, as plain JSON values.
      predictions: for each record, in order, its prediction as plain JSON values.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]


@runtime_checkable
class RecordEncoder(Protocol):
    """What a task may ask of the encoder of a template."""

    template: Template

    @property
    def form(self) -> SequenceForm:
        """The form of the base's sequences."""
        ...

    @property
    def choices(self) -> tuple[np.ndarray, ...]:
        """The ids of each verbalizer."""
        ...

    def encode_prompt(self, record: Record, index: int) -> list[int]:
        """Returns the ids of the prompt."""
        ...

    def encode_target(self, record: Record, index: int, target: str | None = None) -> list[int]:
        """Returns the ids of the target, or of another template, including those that end it."""
        ...

    def encode_conversation(self, record: Record, index: int) -> Example:
        """Encodes a chat whose assistant turns are predicted."""
        ...

    def encode_read(self, record: Record, index: int) -> tuple[list[int], Spans]:
        """Returns the ids of the prompt, and for each the characters that it covers of the field `reads`."""
        ...

    def read_text(self, record: Record, first: int, last: int) -> str:
        """Returns the text of the field `reads` from its token number `first` to `last`, inclusive."""
        ...


@runtime_checkable
class PairCriterion(Protocol):
    """The rewards and losses of an objective that compares a chosen with a rejected answer."""

    def rewards(self, scores: PairScores) -> Float[np.ndarray | Array, "*N 2"]:
        """Returns the rewards of both answers."""
        ...

    def losses(self, scores: PairScores) -> Float[np.ndarray | Array, "*N"]:
        """Returns the loss of each pair."""
        ...


@runtime_checkable
class EncodedRecords(Protocol):
    """What a task may ask of a set of records that was scored."""

    @property
    def encoder(self) -> RecordEncoder:
        """How the records were encoded."""
        ...

    @property
    def records(self) -> Sequence[Record]:
        """The records."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """The encoded records."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The maximum number of tokens of an answer."""
        ...

    @property
    def reference(self) -> Float[np.ndarray, "N 2"] | None:
        """For pairs, the log-probabilities of both answers under the bare base; None where they are not known."""
        ...

    @property
    def criterion(self) -> PairCriterion | None:
        """For pairs, the rewards and losses of the objective; None for those of `reference`."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """Base class of the tasks: frozen dataclasses, registered under their names.

    Attributes:
      name: the word of `--task.name` and `Template.head` and, if the task has a head, of `--method.head`.
      loss: the word of `--loss.over` for the default objective, and the only one with a head.
      has_head: whether the soft prompt needs a head in place of the base's output matrix.
      outputs: the number of outputs of the head; None for one per class.
      reads_field: whether the head predicts something at several positions of the field `Template.reads`.
      bare: whether the base can do the task without a soft prompt, so that it can be compared with other prompts.
      generates: whether the answer is text that the model generates.
      pairs: whether a record is a chosen and a rejected answer to one prompt, the two choices of its example.
      judged: whether answers are sampled and judged by reward functions, so that records need no answer.
      targets: the default templates of the target and of the rejected answer.
    """

    name: ClassVar[str]
    loss: ClassVar[str] = "vocabulary"
    has_head: ClassVar[bool] = False
    outputs: ClassVar[int | None] = None
    reads_field: ClassVar[bool] = False
    bare: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    judged: ClassVar[bool] = False
    targets: ClassVar[tuple[str, str]] = ("", "")

    def with_classes(self, classes: Mapping[str, str]) -> "Task":
        """Returns the task for a template with these verbalizers.

        Args:
          classes: the text that stands for each class.
        """
        del classes
        return self

    def check(self, template: Template) -> None:
        """Checks a template; here, the field that a head reads.

        Args:
          template: the template.

        Raises:
          ConfigError: the template lacks what the task needs.
        """
        if template.rejected and not self.pairs:
            raise ConfigError("data.rejected is the rejected answer of a pair; it needs task.name=preference")
        if (template.reads is not None) != self.reads_field:
            raise ConfigError(
                "data.reads names the field that a tagging or span head reads: set it with such a head, and only then"
            )
        if template.reads is None:
            return
        if template.reads not in template.prompt_fields:
            hint = did_you_mean(template.reads, template.prompt_fields)
            raise ConfigError(f"data.reads={template.reads!r} is not a prompt field; {hint}")
        if template.label_field is None:
            raise ConfigError(f"target {template.target!r}: a {self.name} head needs exactly one field there")
        if template.truncate is not None:
            raise ConfigError(
                f"data.truncate might cut off what a {self.name} head has to predict; split long records instead"
            )

    def classes(self, template: Template, records: Sequence[Record]) -> Mapping[str, str]:
        """Returns the verbalizers, taken from the training records if the template has none and the task needs some.

        Args:
          template: the template.
          records: the training records.

        Raises:
          DataError: a record has no class.
        """
        del records
        return template.verbalizers

    def required_fields(self, template: Template) -> Sequence[str]:
        """Returns the fields that every record must have.

        Args:
          template: the template.
        """
        return template.fields

    def field(self, template: Template, record: Record, name: str, index: int) -> str:
        """Returns the text of a field.

        Args:
          template: the template.
          record: the record.
          name: the field.
          index: the record's number from 0, for messages.

        Raises:
          DataError: the field is missing or is not text.
        """
        del template
        return field_text(record, name, index)

    def encode(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes a record.

        Args:
          encoder: that of the template.
          record: the record.
          index: its number from 0, for messages.

        Returns:
          What is predicted, and from which ids.

        Raises:
          DataError: a field is missing, or what is to be predicted is not valid.
        """
        raise NotImplementedError

    def encode_chat(self, encoder: RecordEncoder, record: Record, index: int) -> Example:
        """Encodes a record for a prompt with `{messages}`; by default a chat whose assistant turns are predicted.

        Args:
          encoder: that of the template.
          record: the record.
          index: its number from 0, for messages.

        Returns:
          What is predicted, and from which ids.

        Raises:
          DataError: the record is not a chat, or it has no assistant turn.
        """
        return encoder.encode_conversation(record, index)

    def reference(self, template: Template, record: Record) -> str:
        """Returns the text of the correct answer.

        Args:
          template: the template.
          record: a record with its target.
        """
        pieces = parse(template.target)
        texts = (field_text(record, p.name, 0) if isinstance(p, Field) else getattr(p, "text", "") for p in pieces)
        return "".join(texts).strip()

    def with_any_label(self, template: Template, record: Record) -> dict[str, Any]:
        """Returns a record to predict, with an arbitrary label in place of the unknown one.

        Args:
          template: the template.
          record: a record without its target.

        Raises:
          DataError: there is nothing to predict.
        """
        return {**record, template.label_field or "": next(iter(template.verbalizers))}

    def class_scores(self, scores: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
        """Returns the scores of classes as they are served: the log-probability of each verbalizer or class.

        Args:
          scores: the log-probabilities of C classes for N records.
        """
        return scores

    def evaluate(self, scores: Scores, data: EncodedRecords) -> Evaluation:
        """Computes the metrics, which must include "loss" and "examples", and the predictions.

        Args:
          scores: for each example, the log-probability of each choice, of its only target, or of each class [C]; if the
            head reads a field, its logits [R, C] at the R positions.
          data: the records and how they were encoded.

        Returns:
          The metrics, and a prediction for each record.
        """
        raise NotImplementedError


TASKS: dict[str, Task] = {}


def register(*tasks: Task) -> None:
    """Adds tasks by name, so that templates and configs can name them, and methods can have their heads.

    Args:
      *tasks: the tasks. One of a name that exists replaces it.
    """
    for task in tasks:
        TASKS[task.name] = task
        TEMPLATE_TASKS[task.name] = task


def works_bare(template: Template, base: FrozenBase) -> bool:
    """Returns whether the base can do the task of a template without a soft prompt, so that it can be compared.

    Args:
      template: the template.
      base: the base. An encoder needs a mask token in the prompt, and an output matrix.
    """
    form = form_of(base.tokenizer, base.layout)
    masked = form.mask is not None and form.mask[0] in form.marked(template.prompt) and base.layout.predicts_tokens
    return task_of(template).bare and (form.causal or masked)


def task_of(template: Template) -> Task:
    """Returns the task of a template.

    Args:
      template: the template.

    Returns:
      The task that its head names, with its classes.
    """
    return TASKS[template.head].with_classes(template.verbalizers)


def prompt_index(template: Template, record: Record, index: int) -> int:
    """Returns the index of the soft prompt of a record's task.

    Args:
      template: a template with tasks.
      record: the record.
      index: its number from 0, for messages.

    Raises:
      DataError: the record names no task, or one without a soft prompt.
    """
    name = field_text(record, template.task or "", index)
    if name not in template.tasks:
        raise DataError(
            f"record {index + 1}: there is no prompt for the task {name!r}; {did_you_mean(name, template.tasks)}"
        )
    return template.tasks.index(name)
