"""Cross-entropy of an answer's start and end over the positions of a text."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.data.batches import Rows
from spt_jax.data.reading import END, START
from spt_jax.errors import ConfigError
from spt_jax.models.model import TargetScores
from spt_jax.training.objectives.objective import Loss, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCrossEntropy(Objective):
    """The mean of the cross-entropies of the answer's start and end over the positions of the text.

    It is the loss of transformers' question-answering models, but only over the text that the head reads.
    """

    needs_head: ClassVar[bool] = True

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the examples' losses, and the sum of their weights."""
        if scores.logits is None:
            raise ConfigError("a loss over spans needs a span head")
        examples = rows.labels.shape[1]
        flags = jnp.stack([rows.target_ids & START, rows.target_ids & END], axis=-1) > 0

        def of_row(
            values: Float[Array, "M 2"],
            real: Bool[Array, " M"],
            flags: Bool[Array, "M 2"],
            groups: Int[Array, " M"],
            weights: Float[Array, " E"],
        ) -> Float[Array, ""]:
            masked = jnp.where(real[:, None], values, -jnp.inf)
            highest = jax.lax.stop_gradient(jax.ops.segment_max(masked, groups, num_segments=examples))
            shifted = jnp.where(real[:, None], values - highest[groups], 0.0)
            sums = jax.ops.segment_sum(jnp.where(real[:, None], jnp.exp(shifted), 0.0), groups, num_segments=examples)
            chosen = jax.ops.segment_sum(jnp.where(flags & real[:, None], shifted, 0.0), groups, num_segments=examples)
            log_sums = jnp.log(jnp.where(weights[:, None] > 0, sums, 1.0))
            return jnp.sum(weights * jnp.mean(log_sums - chosen, axis=-1))

        real = rows.target_weights > 0
        losses = jax.vmap(of_row)(scores.logits, real, flags, rows.target_groups, rows.example_weights)
        return jnp.sum(losses), jnp.sum(rows.example_weights)
