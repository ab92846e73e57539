"""The objective of distillation of a classifier: the distribution over the classes with a text in the context."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import scores_after_text
from spt_jax.inference.forward import group_scores
from spt_jax.models.model import TargetScores, TeacherStates
from spt_jax.training.objectives.distillation import Distillation
from spt_jax.training.objectives.objective import Loss, Objective

# The fields of `Distillation` that may be set.
_ALLOWED = ("text", "temperature", "chat_system", "system_rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassDistillation(Distillation):
    """KL divergence between the distributions over the classes: after a text, and under the soft prompt.

    `Distillation` compares the next tokens of the whole vocabulary, and verbalizers that are improbable there, which
    after a short prompt they often are, hardly count. Here, p and q are the softmax over the C classes of the
    log-probabilities of their verbalizers, divided by the temperature T. The loss is the mean over the examples of
    T^2 KL(p || q), in nats. Which class is correct plays no part.

    The teacher's C log-probabilities are computed once, before training.

    Attributes:
      text, temperature, chat_system, system_rest: as in `Distillation`.
      top_k, answer_tokens, answer_temperature, study, study_validation, study_kinds, study_tokens, study_temperature:
        must have their defaults, because the classes are given, and all of them are compared.
      choices: the number of scored sequences per example, `BatchPlan.choices`.

    Raises:
      ConfigError: a field is out of its range.
    """

    uses_choices: ClassVar[bool] = True

    choices: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(Distillation):
            if field.name not in _ALLOWED and getattr(self, field.name) != field.default:
                raise ConfigError(f"loss.{field.name} is not for class_distillation, whose answers are the classes")
        if self.choices < 1:
            raise ConfigError(f"ClassDistillation.choices is {self.choices}; it must be at least 1")

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> Sequence[PyTree]:
        """Returns the log-probability of each verbalizer after the text."""
        return list(scores_after_text(base, self.text_ids(base), examples))

    def scored_ids(self, rows: Rows) -> Array:
        """Returns the verbalizers' tokens."""
        return Objective.scored_ids(self, rows)

    def teacher(self, rows: Rows) -> TeacherStates | None:
        """Returns None: the classes are enough."""
        return None

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the divergences, and the sum of the examples' weights."""
        if rows.extra is None:
            raise ConfigError("ClassDistillation needs the teacher's scores; call prepare_examples before packing")
        teacher = typing.cast(Float[Array, "B E C"], rows.extra) / self.temperature
        student = group_scores(scores, rows, self.choices) / self.temperature
        log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
        values = self.temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        weights = rows.example_weights
        return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), jnp.sum(weights)
