"""Base class of the objectives: frozen dataclasses with a pure loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
from jaxtyping import Array, Float, Int, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.models.model import TargetScores, TeacherStates

Loss = tuple[Float[Array, ""], Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base class of the objectives. The fields of a subclass are its options.

    A loss is a pair (sum, weight), divided once per step: microbatches, packing and devices do not change the mean.

    Attributes:
      uses_choices: whether examples keep all their choices; otherwise the correct choice is their only target.
      needs_head: whether the loss needs the logits of a task head.
      pairs: whether each example must be a pair of a chosen and a rejected answer.
      samples: whether the answers are sampled under the prompt being trained (`spt_jax.training.rollouts`).
      metric_names: the names of `metrics`, which are fixed so that a step can add them up.
    """

    uses_choices: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ()

    def planned(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Returns the examples that the shapes of batches are planned for; by default these.

        An objective that samples answers returns examples with answers of the greatest length.

        Args:
          examples: the examples that the task encoded.
        """
        return examples

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> Sequence[PyTree] | None:
        """Returns what the loss needs to know about each example, such as reference scores; None if nothing.

        It runs once, on the host, before training. The arrays of all examples must have the same structure and shapes;
        they reach the loss as `Rows.extra`, stacked to [B, E, ...].

        Args:
          base: the frozen base.
          examples: all examples of the run.

        Raises:
          ConfigError: the objective is not compatible with the base or the examples.
        """
        del base, examples
        return None

    def scored_ids(self, rows: Rows) -> Int[Array, "B M K"]:
        """Returns the K ids to score at each target; by default only the target itself.

        Args:
          rows: the rows of a batch.
        """
        return rows.target_ids[:, :, None]

    def teacher(self, rows: Rows) -> TeacherStates | None:
        """Returns the hidden states of a teacher at each target, for `TargetScores.divergences`; None if there is none.

        Args:
          rows: the rows of a batch.
        """
        del rows
        return None

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the losses of some rows, and the sum of the weights. Differentiable.

        Args:
          scores: the scores of `scored_ids`, and what else is known of the logits.
          rows: the rows. Targets and examples of weight 0 are padding.
        """
        raise NotImplementedError

    def metrics(self, scores: TargetScores, rows: Rows) -> Mapping[str, Loss]:
        """Returns what a step reports beside the loss, by the names `metric_names`: each a weighted sum and its weight.

        Args:
          scores: as in `loss`.
          rows: as in `loss`.
        """
        del scores, rows
        return {}


def prepare_examples(objective: Objective, base: FrozenBase, examples: Sequence[Example]) -> Sequence[Example]:
    """Returns the examples with the result of `Objective.prepare`.

    Args:
      objective: the loss.
      base: the frozen base.
      examples: all examples of the run.

    Returns:
      The examples with `extra`, or as they are if the objective needs nothing.

    Raises:
      ConfigError: the objective refuses the base or the examples, or does not return one result per example.
    """
    extras = objective.prepare(base, examples)
    if extras is None:
        return examples
    if len(extras) != len(examples):
        raise ConfigError(
            f"{type(objective).__name__}.prepare returned {len(extras)} results for {len(examples)} examples;"
            " it must return one for each"
        )
    extras = jax.device_get(list(extras))
    return [dataclasses.replace(example, extra=extra) for example, extra in zip(examples, extras, strict=True)]


def check_smoothing(objective: Objective, label_smoothing: float) -> None:
    """Checks the label smoothing of an objective.

    Raises:
      ConfigError: it is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        name = type(objective).__name__
        raise ConfigError(f"{name}.label_smoothing is {label_smoothing}; it must be in [0, 1)")
