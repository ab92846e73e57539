"""Cross-entropy of the correct class, given the sequence probabilities of the verbalizers."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from spt_jax.data.batches import Rows
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import group_scores
from spt_jax.models.model import TargetScores
from spt_jax.training.objectives.objective import Loss, Objective, check_smoothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerbalizerCrossEntropy(Objective):
    """The weighted cross-entropy of the correct class, given the sequence probabilities of the verbalizers.

    The score of a class is the log-probability of its verbalizer. With verbalizers of one token, the distribution over
    classes is therefore the softmax over only their logits.

    Attributes:
      choices: the number of scored sequences per example, `BatchPlan.choices`.
      label_smoothing: the share of the target distribution that is spread evenly over the classes.

    Raises:
      ConfigError: a field is out of its range.
    """

    uses_choices: ClassVar[bool] = True

    choices: int
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)
        if self.choices < 1:
            raise ConfigError(f"VerbalizerCrossEntropy.choices is {self.choices}; it must be at least 1")

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the examples' losses, and the sum of their weights."""
        # Class weights do not enter the scores: they multiply the losses of examples.
        choice_scores = group_scores(scores, rows, self.choices)
        log_probabilities = jax.nn.log_softmax(choice_scores, axis=-1)
        right = jnp.take_along_axis(log_probabilities, rows.labels[:, :, None], axis=-1)[..., 0]
        losses = -(1 - self.label_smoothing) * right - self.label_smoothing * jnp.mean(log_probabilities, axis=-1)
        return jnp.sum(rows.example_weights * losses), jnp.sum(rows.example_weights)
