"""Objectives of pairs: a chosen and a rejected answer to one prompt.

Below, log p(y) is the log-probability of an answer under the soft prompt, log p_base(y) under the bare base, |y| its
number of tokens, and w and l stand for the chosen and the rejected answer. The bare base is the reference model.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.data.preferences import PairScores
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import reference_scores
from spt_jax.inference.forward import group_scores
from spt_jax.models.model import TargetScores
from spt_jax.training.objectives.objective import Loss, Objective

_LEAST_GAP = 1e-6  # a mean log-probability nearer to 0 has odds that float32 does not resolve

Pairs = Float[np.ndarray | Array, "*N 2"]
PerPair = Float[np.ndarray | Array, "*N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairObjective(Objective):
    """Base class of the objectives of pairs. A subclass defines `rewards` and `losses`.

    Attributes:
      uses_choices: as in `Objective`.
      pairs: as in `Objective`.
      metric_names: as in `Objective`; `chosen_log_ratio` only with a reference.
      needs_reference: whether the loss needs the scores of the bare base.
    """

    uses_choices: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "reward_margin")
    needs_reference: ClassVar[bool] = False

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> Sequence[Float[np.ndarray, "2"]] | None:
        """Returns the scores of both answers under the bare base, if the loss needs them.

        Raises:
          ConfigError: an example is not a pair whose first choice is the chosen answer.
        """
        wrong = next((e for e in examples if len(e.choices) != 2 or e.label != 0), None)
        if wrong is not None:
            raise ConfigError(
                f"{type(self).__name__} needs two choices per example, the chosen answer first; record"
                f" {wrong.index + 1} has {len(wrong.choices)}; encode the records with the task preference"
            )
        return list(reference_scores(base, examples)) if self.needs_reference else None

    def rewards(self, scores: PairScores) -> Pairs:
        """Returns the rewards of both answers.

        Args:
          scores: the scores of the answers.
        """
        raise NotImplementedError

    def losses(self, scores: PairScores) -> PerPair:
        """Returns the loss of each pair.

        Args:
          scores: the scores of the answers.
        """
        raise NotImplementedError

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the pairs' losses, and the sum of their weights."""
        weights = rows.example_weights
        losses = self.losses(self._pairs(scores, rows))
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0)), jnp.sum(weights)

    def metrics(self, scores: TargetScores, rows: Rows) -> Mapping[str, Loss]:
        """Returns the sums over pairs, and over the tokens of chosen answers for `chosen_log_ratio`."""
        pairs, weights = self._pairs(scores, rows), rows.example_weights
        margins = self.rewards(pairs)[..., 0] - self.rewards(pairs)[..., 1]
        total = jnp.sum(weights)
        found = {
            "accuracy": (jnp.sum(weights * (1 + jnp.sign(margins)) / 2), total),
            "reward_margin": (jnp.sum(weights * margins), total),
        }
        if pairs.reference is not None and "chosen_log_ratio" in self.metric_names:
            ratios = (pairs.log_probabilities - pairs.reference)[..., 0]
            found["chosen_log_ratio"] = jnp.sum(weights * ratios), jnp.sum(weights * pairs.lengths[..., 0])
        return found

    def _pairs(self, scores: TargetScores, rows: Rows) -> PairScores:
        """Returns the scores of the pairs of some rows; those of padding are of answers of one token."""
        real = (rows.target_weights > 0).astype(jnp.float32)[:, :, None]
        counted = dataclasses.replace(scores, log_probabilities=real)
        lengths = jnp.maximum(group_scores(counted, rows, 2), 1).astype(jnp.int32)
        log_probabilities = group_scores(scores, rows, 2)
        padding = rows.example_weights[:, :, None] == 0
        return PairScores(jnp.where(padding, -1.0, log_probabilities), lengths, rows.extra)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(PairObjective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), and conservative DPO.

    With the reward r(y) = beta * (log p(y) - log p_base(y)) and the margin h = r(w) - r(l), the loss is
    -(1 - e) log sigmoid(h) - e log sigmoid(-h). DPO is e = 0; e > 0 is conservative DPO (Mitchell 2023, "A note on DPO
    with noisy preferences & relationship to IPO", eq. 3), for preferences that are wrong with probability e.

    Attributes:
      beta: how strongly the soft prompt is held to the base; positive.
      label_smoothing: e, the probability that a preference is the wrong way round; in [0, 0.5).

    Raises:
      ConfigError: a field is out of its range.
    """

    needs_reference: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "reward_margin", "chosen_log_ratio")

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(self, "beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"loss.label_smoothing is {self.label_smoothing}; for dpo it must be in [0, 0.5)")

    def rewards(self, scores: PairScores) -> Pairs:
        """Returns beta times the log-ratios to the bare base."""
        return self.beta * _log_ratios(scores)

    def losses(self, scores: PairScores) -> PerPair:
        """Returns the loss of each pair."""
        margin, noise = _difference(self.rewards(scores)), self.label_smoothing
        return -(1 - noise) * jax.nn.log_sigmoid(margin) - noise * jax.nn.log_sigmoid(-margin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ipo(PairObjective):
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    With h = log p(w) - log p_base(w) - log p(l) + log p_base(l), summed over tokens, the loss is (h - 1 / (2 beta))^2.
    The margin of the log-ratios is therefore bounded, also where all preferences agree. The paper's tau is beta.

    Attributes:
      beta: how strongly the soft prompt is held to the base; positive.

    Raises:
      ConfigError: beta is not positive.
    """

    needs_reference: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "reward_margin", "chosen_log_ratio")

    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(self, "beta", self.beta)

    def rewards(self, scores: PairScores) -> Pairs:
        """Returns beta times the log-ratios to the bare base."""
        return self.beta * _log_ratios(scores)

    def losses(self, scores: PairScores) -> PerPair:
        """Returns the loss of each pair."""
        return (_difference(_log_ratios(scores)) - 1 / (2 * self.beta)) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimPo(PairObjective):
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6), without a reference model.

    With the reward r(y) = beta / |y| * log p(y), the loss is -log sigmoid(r(w) - r(l) - gamma).

    Attributes:
      beta: the scale of the reward; positive.
      gamma: the margin that the rewards should differ by; at least 0. The paper recommends 0.3 to 0.5 of beta.

    Raises:
      ConfigError: a field is out of its range.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "beta", self.beta)
        _check_at_least_zero(self, "gamma", self.gamma)

    def rewards(self, scores: PairScores) -> Pairs:
        """Returns beta times the mean log-probabilities per token."""
        return self.beta * scores.log_probabilities / scores.lengths

    def losses(self, scores: PairScores) -> PerPair:
        """Returns the loss of each pair."""
        return -jax.nn.log_sigmoid(_difference(self.rewards(scores)) - self.gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orpo(PairObjective):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7), without a reference model.

    With P(y) = exp(log p(y) / |y|) and odds(y) = P(y) / (1 - P(y)), the loss is
    -log P(w) - strength * log sigmoid(log odds(w) - log odds(l)). The first term is the cross-entropy of the chosen
    answer per token. The paper's lambda is `strength`.

    Attributes:
      strength: the weight of the odds ratio; at least 0.

    Raises:
      ConfigError: the strength is negative.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        _check_at_least_zero(self, "strength", self.strength)

    def rewards(self, scores: PairScores) -> Pairs:
        """Returns the log-odds times the strength."""
        return self.strength * _log_odds(scores)

    def losses(self, scores: PairScores) -> PerPair:
        """Returns the loss of each pair."""
        chosen = scores.log_probabilities[..., 0] / scores.lengths[..., 0]
        return -chosen - self.strength * jax.nn.log_sigmoid(_difference(_log_odds(scores)))


def _log_ratios(scores: PairScores) -> Pairs:
    if scores.reference is None:
        raise ConfigError("this objective needs the scores of the bare base: see `spt_jax.prepare_examples`")
    return scores.log_probabilities - scores.reference


def _log_odds(scores: PairScores) -> Pairs:
    """Returns log P - log(1 - P), with the difference computed as Mächler (2012) recommends."""
    mean = jnp.minimum(scores.log_probabilities / scores.lengths, -_LEAST_GAP)
    near = mean > -math.log(2)
    log_rest = jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, mean, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, mean)))
    )
    return mean - log_rest


def _difference(values: Pairs) -> PerPair:
    return values[..., 0] - values[..., 1]


def _check_positive(objective: PairObjective, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{type(objective).__name__}.{name} is {value}; it must be positive and finite")


def _check_at_least_zero(objective: PairObjective, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{type(objective).__name__}.{name} is {value}; it must be finite and at least 0")
