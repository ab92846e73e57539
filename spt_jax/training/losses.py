"""Losses as pairs (sum, weight), divided only once: microbatches, packing and devices do not change the mean."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.data.batches import Rows
from spt_jax.data.reading import END, START
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import TargetScores, group_scores

Loss = tuple[Float[Array, ""], Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss is minimized.

    Attributes:
      over: "vocabulary" is the next-token cross-entropy of the target; "verbalizers" is the cross-entropy of the
        correct class, given the sequence probabilities of the verbalizers; "span" is over the positions of the text
        that a span head reads. Defaults to "verbalizers" if there are any. With a task head it is set automatically.
      label_smoothing: the share of the target distribution that is spread evenly over the vocabulary or the classes.
      class_weights: a weight per class, in the order of the verbalizers; if empty, all classes have equal weight.
    """

    over: Literal["vocabulary", "verbalizers", "span"] | None = None
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        finite = all(0 <= weight < math.inf for weight in self.class_weights)
        if not finite or (self.class_weights and not any(self.class_weights)):
            raise ConfigError("loss.class_weights must be finite numbers of at least 0, and not all 0")


def vocabulary_loss(scores: TargetScores, rows: Rows, choices: int, smoothing: float) -> Loss:
    """Returns the weighted cross-entropy of the targets over the vocabulary, and the sum of the weights.

    Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567).
    """
    if choices > 1:
        raise ConfigError("a loss over the vocabulary needs examples with one target: batch `Example.as_target()`")
    if smoothing and scores.means is None:
        raise ConfigError(
            "loss.label_smoothing over the vocabulary is not compatible with a base whose logits are capped"
        )
    losses = -(1 - smoothing) * scores.log_probabilities
    if scores.means is not None:
        losses -= smoothing * scores.means
    weights = rows.target_weights
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0)), jnp.sum(weights)


def verbalizer_loss(scores: TargetScores, rows: Rows, choices: int, smoothing: float) -> Loss:
    """Returns the weighted cross-entropy of the correct class, and the sum of the examples' weights.

    The score of a class is the log-probability of its verbalizer. With verbalizers of one token, the distribution over
    classes is therefore the softmax over only their logits.
    """
    # Class weights do not enter the scores: they multiply the losses of examples.
    choice_scores = group_scores(scores, rows, choices)
    log_probabilities = jax.nn.log_softmax(choice_scores, axis=-1)
    right = jnp.take_along_axis(log_probabilities, rows.labels[:, :, None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * right - smoothing * jnp.mean(log_probabilities, axis=-1)
    return jnp.sum(rows.example_weights * losses), jnp.sum(rows.example_weights)


def span_loss(scores: TargetScores, rows: Rows, choices: int, smoothing: float) -> Loss:
    """Returns the mean of the cross-entropies of the answer's start and end over the positions of the text.

    It is the loss of transformers' question-answering models, but only over the text that the head reads.
    """
    del choices
    if smoothing:
        raise ConfigError("loss.label_smoothing is not compatible with a span head")
    examples = rows.labels.shape[1]
    real = rows.target_weights > 0
    if scores.logits is None:
        raise ConfigError("a loss over spans needs a span head")
    at_reads = scores.logits
    flags = jnp.stack([rows.target_ids & START, rows.target_ids & END], axis=-1) > 0

    def of_row(values: Any, real: Any, flags: Any, groups: Any, weights: Any) -> Float[Array, ""]:
        masked = jnp.where(real[:, None], values, -jnp.inf)
        highest = jax.lax.stop_gradient(jax.ops.segment_max(masked, groups, num_segments=examples))
        shifted = jnp.where(real[:, None], values - highest[groups], 0.0)
        sums = jax.ops.segment_sum(jnp.where(real[:, None], jnp.exp(shifted), 0.0), groups, num_segments=examples)
        chosen = jax.ops.segment_sum(jnp.where(flags & real[:, None], shifted, 0.0), groups, num_segments=examples)
        log_sums = jnp.log(jnp.where(weights[:, None] > 0, sums, 1.0))
        return jnp.sum(weights * jnp.mean(log_sums - chosen, axis=-1))

    losses = jax.vmap(of_row)(at_reads, real, flags, rows.target_groups, rows.example_weights)
    return jnp.sum(losses), jnp.sum(rows.example_weights)


def context_loss(
    logits: Float[Array, "P V"],
    lead_ids: Int[Array, " P"],
    vocab_size: int,
    targets: Sequence[tuple[int, int, float]],
) -> Loss:
    """Returns the weighted cross-entropy of virtual tokens that stand for real ones, and how many are counted.

    The first token of a sequence is not counted, since nothing predicts it.

    Args:
      logits: the logits after each leading id.
      lead_ids: the leading ids. If one of the virtual tokens is not among them, the loss is NaN.
      vocab_size: virtual token i has the id `vocab_size + i`.
      targets: `Method.context_targets`.
    """
    numbers, ids, weights = (np.asarray(column) for column in zip(*targets, strict=True))
    matches = lead_ids[None, :] == vocab_size + numbers[:, None]
    positions = jnp.argmax(matches, axis=1)
    losses = -jax.nn.log_softmax(logits)[jnp.maximum(positions - 1, 0), ids]
    losses = jnp.where(matches.any(axis=1), jnp.where(positions > 0, weights * losses, 0.0), jnp.nan)
    return jnp.sum(losses), jnp.sum((positions > 0).astype(jnp.float32))


LOSSES: dict[str, Callable[..., Loss]] = {
    "vocabulary": vocabulary_loss,
    "verbalizers": verbalizer_loss,
    "span": span_loss,
}
