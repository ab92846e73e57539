"""Losses as (sum, weight), to be divided once, so that microbatches, packing and devices never change the mean."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.data.batches import Rows
from spt_jax.errors import ConfigError
from spt_jax.forward import group_scores, target_log_probabilities

Loss = tuple[Float[Array, ""], Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised.

    Attributes:
      over: vocabulary is next-token cross-entropy of the target; verbalizers is cross-entropy of the right class among
        the verbalizers' sequence probabilities. Default verbalizers where there are some.
      label_smoothing: share of the target distribution spread evenly over the vocabulary or the classes.
      class_weights: weight per class, in the verbalizers' order; none weighs all classes alike.
    """

    over: Literal["vocabulary", "verbalizers"] | None = None
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing is {self.label_smoothing}; it lies in [0, 1)")
        finite = all(0 <= weight < math.inf for weight in self.class_weights)
        if not finite or (self.class_weights and not any(self.class_weights)):
            raise ConfigError("loss.class_weights must be numbers of at least 0, one of them above")


def vocabulary_loss(logits: Float[Array, "B Q V"], rows: Rows, choices: int, smoothing: float) -> Loss:
    """Weighted cross-entropy of the targets over the vocabulary, and the sum of the weights.

    Smoothing as in Szegedy et al. 2016 (arXiv 1512.00567).
    """
    if choices > 1:
        raise ConfigError("over the vocabulary, examples have one target: batch `Example.as_target()`")
    losses = -target_log_probabilities(logits, rows)
    weights = rows.target_weights
    if smoothing:
        even = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        even = jnp.take_along_axis(even, rows.target_outputs, axis=1)
        losses = (1 - smoothing) * losses + smoothing * even
    return jnp.sum(weights * losses), jnp.sum(weights)


def verbalizer_loss(logits: Float[Array, "B Q V"], rows: Rows, choices: int, smoothing: float) -> Loss:
    """Weighted cross-entropy of the right class, and the sum of the examples' weights.

    A class's score is the log-probability of its verbalizer, so that for verbalizers of one token this is the softmax
    over their logits alone.
    """
    # The scores ignore class weights, which weigh whole examples.
    scores = group_scores(target_log_probabilities(logits, rows), rows, choices)
    log_probabilities = jax.nn.log_softmax(scores, axis=-1)
    right = jnp.take_along_axis(log_probabilities, rows.labels[:, :, None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * right - smoothing * jnp.mean(log_probabilities, axis=-1)
    return jnp.sum(rows.example_weights * losses), jnp.sum(rows.example_weights)


LOSSES: dict[str, Callable[..., Loss]] = {"vocabulary": vocabulary_loss, "verbalizers": verbalizer_loss}
