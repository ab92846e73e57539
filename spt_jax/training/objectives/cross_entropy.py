"""Cross-entropy of the next token or of a task head's class."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.models.model import TargetScores
from spt_jax.training.objectives.objective import Loss, Objective, check_smoothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """The weighted cross-entropy of the targets over the vocabulary, or over the classes of a task head.

    Attributes:
      label_smoothing: the share of the target distribution that is spread evenly over the vocabulary or the classes
        (Szegedy et al. 2016, arXiv 1512.00567).

    Raises:
      ConfigError: the label smoothing is not in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> None:
        """Checks that each example has one target.

        Raises:
          ConfigError: an example has choices.
        """
        del base
        if any(len(example.choices) > 1 for example in examples):
            raise ConfigError("a loss over the vocabulary needs examples with one target: batch `Example.as_target()`")

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the targets' losses, and the sum of their weights."""
        if self.label_smoothing and scores.means is None:
            raise ConfigError(
                "loss.label_smoothing over the vocabulary is not compatible with a base whose logits are capped"
            )
        losses = -(1 - self.label_smoothing) * scores.log_probabilities[:, :, 0]
        if scores.means is not None:
            losses -= self.label_smoothing * scores.means
        weights = rows.target_weights
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0)), jnp.sum(weights)
