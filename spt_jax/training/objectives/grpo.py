"""The objective of group relative policy optimization: rewards of answers that the soft prompt itself samples."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.models.model import TargetScores
from spt_jax.training.objectives.objective import Loss, Objective
from spt_jax.training.objectives.targets import of_targets

_EQUAL = 1e-9  # rewards of a group that differ by no more are equal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(Objective):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, eq. 3), and its variants.

    G answers to each question are sampled under the soft prompt being trained. The advantage A of an answer is its
    reward minus the mean of its group, divided by the standard deviation of the group. With r = p(token) / p_old(token)
    of an answer's token, where p_old is the probability under the prompt that sampled it, the loss of the token is
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta k. Here k = q - log q - 1 with q = p_base / p estimates the
    KL divergence to the bare base without bias (Schulman 2020; eq. 4). The defaults are those of the paper.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is `normalize_by_std=False, length_normalization="constant", beta=0`.
    DAPO (Yu et al. 2025, arXiv 2503.14476) is `clip_high=0.28, length_normalization="token", beta=0,
    drop_equal_groups=True`; unlike there, no further groups are sampled in place of those that are dropped.

    Probabilities are those at temperature 1, also if answers are sampled at another temperature.

    Attributes:
      uses_choices: as in `Objective`.
      samples: as in `Objective`.
      metric_names: as in `Objective`: k, and the share of tokens whose ratio is clipped, both over all tokens.
      group_size: G, the number of answers to each question; at least 2.
      max_new_tokens: the maximum number of tokens of an answer.
      temperature: that of the samples; positive.
      updates: optimizer steps with the answers of one rollout.
      clip_low: how far a ratio may fall below 1 before it is clipped; in (0, 1).
      clip_high: how far it may rise above 1; positive.
      beta: the weight of the KL divergence; at least 0.
      normalize_by_std: whether advantages are divided by the standard deviation (of a sample, with G - 1).
      length_normalization: how tokens are weighted. sample: the mean over the tokens of each answer, then over answers;
        token: the mean over the tokens of all answers of a batch; constant: the sum over the tokens of each answer
        divided by `max_new_tokens`, then the mean over answers.
      drop_equal_groups: whether groups whose rewards are all equal have no weight, rather than an advantage of 0.

    Raises:
      ConfigError: a field is out of its range.
    """

    uses_choices: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    metric_names: ClassVar[tuple[str, ...]] = ("kl", "clip_share")

    group_size: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    updates: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    normalize_by_std: bool = True
    length_normalization: Literal["sample", "token", "constant"] = "sample"
    drop_equal_groups: bool = False

    def __post_init__(self) -> None:
        for name, least in (("group_size", 2), ("max_new_tokens", 1), ("updates", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("temperature", "clip_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; it must be positive and finite")
        if not 0 < self.clip_low < 1:
            raise ConfigError(f"loss.clip_low is {self.clip_low}; it must be in (0, 1)")
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"loss.beta is {self.beta}; it must be finite and at least 0")
        if self.length_normalization not in ("sample", "token", "constant"):
            raise ConfigError(
                f"loss.length_normalization is {self.length_normalization!r}; it must be sample, token or constant"
            )

    def planned(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Returns the questions with G answers of the greatest length, which stand for those to be sampled."""
        longest = (np.zeros(self.max_new_tokens, np.int32),) * self.group_size
        return [dataclasses.replace(example, choices=longest) for example in examples]

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> Sequence[Mapping[str, np.ndarray]]:
        """Returns what the loss needs to know of answers, for those that `planned` returned: no advantages."""
        del base
        tokens = np.zeros((self.group_size, self.max_new_tokens), np.float32)
        lengths = np.full(self.group_size, self.max_new_tokens, np.int32)
        group = np.zeros(self.group_size, np.float32)
        return [group_extra(group, group, lengths, tokens, tokens) for _ in examples]

    def advantages(
        self, rewards: Float[np.ndarray, "N G"]
    ) -> tuple[Float[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
        """Returns the advantages of the answers, and their weights, which are 0 or 1.

        Args:
          rewards: the rewards of N groups. NaN stands for an answer without a reward, which has no weight.
        """
        known = np.isfinite(rewards)
        count = np.maximum(known.sum(axis=1, keepdims=True), 1)
        values = np.where(known, rewards, 0.0)
        centered = np.where(known, values - values.sum(axis=1, keepdims=True) / count, 0.0)
        spread = has_spread(rewards)[:, None]
        if self.normalize_by_std:
            deviation = np.sqrt((centered**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
            centered = centered / np.where(spread, deviation, 1.0)
        weights = known & (spread if self.drop_equal_groups else True)
        return np.where(spread, centered, 0.0).astype(np.float32), weights.astype(np.float32)

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the tokens' losses, and the sum of the weights of tokens or answers."""
        ratio, k, advantage, per_answer, length = self._tokens(scores, rows)
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        values = self.beta * k - jnp.minimum(ratio * advantage, clipped * advantage)
        weights, total = per_answer, jnp.sum(per_answer)
        if self.length_normalization == "token":
            weights = per_answer * length
            total = jnp.sum(weights)
        elif self.length_normalization == "constant":
            weights = per_answer * length / self.max_new_tokens
        return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), total

    def metrics(self, scores: TargetScores, rows: Rows) -> Mapping[str, Loss]:
        """Returns the sums over the tokens."""
        ratio, k, advantage, per_answer, length = self._tokens(scores, rows)
        weights = per_answer * length
        low, high = (ratio < 1 - self.clip_low) & (advantage < 0), (ratio > 1 + self.clip_high) & (advantage > 0)
        total = jnp.sum(weights)
        return {
            "kl": (jnp.sum(jnp.where(weights > 0, weights * k, 0.0)), total),
            "clip_share": (jnp.sum(weights * (low | high)), total),
        }

    def _tokens(self, scores: TargetScores, rows: Rows) -> tuple[Array, Array, Array, Array, Array]:
        """Returns for each target the ratio, k, the advantage, the answer's weight per token, and the answer's length.

        Raises:
          ConfigError: the examples of the rows were not sampled or prepared.
        """
        if rows.extra is None:
            raise ConfigError("Grpo needs sampled answers with their rewards: see `spt_jax.training.rollouts`")
        extra = typing.cast(Mapping[str, Array], rows.extra)

        def of_answers(name: str) -> Array:
            values = extra[name].reshape(len(rows.ids), -1)
            return jnp.take_along_axis(values, rows.target_groups, axis=1)

        def of_tokens(name: str) -> Array:
            values = extra[name].reshape(len(rows.ids), -1, self.max_new_tokens, 1)
            return of_targets(values, rows)[..., 0]

        # The prompt does not choose a token that the base forces: its ratio is 1.
        real = (rows.target_weights > 0) & ~jnp.isnan(of_tokens("old"))
        own = jnp.where(real, scores.log_probabilities[..., 0], 0.0)
        old, reference = (jnp.where(real, of_tokens(name), 0.0) for name in ("old", "reference"))
        length = jnp.maximum(of_answers("lengths"), 1).astype(jnp.float32)
        per_answer = rows.target_weights * of_answers("weights") / length
        apart = reference - own
        return jnp.exp(own - old), jnp.exp(apart) - apart - 1, of_answers("advantages"), per_answer, length


def group_extra(
    advantages: Float[np.ndarray, " G"],
    weights: Float[np.ndarray, " G"],
    lengths: np.ndarray,
    old: Float[np.ndarray, "G N"],
    reference: Float[np.ndarray, "G N"],
) -> Mapping[str, np.ndarray]:
    """Returns the `Example.extra` of a question and its answers.

    Args:
      advantages: the advantages.
      weights: the weights.
      lengths: the numbers of tokens.
      old: the log-probability of each token under the prompt that sampled it, padded; NaN for one that the base forces.
      reference: that under the bare base.
    """
    arrays = {"advantages": advantages, "weights": weights, "old": old, "reference": reference}
    return {**{name: array.astype(np.float32) for name, array in arrays.items()}, "lengths": lengths.astype(np.int32)}


def has_spread(rewards: Float[np.ndarray, "N G"]) -> np.ndarray:
    """Returns for each group whether its known rewards differ.

    Args:
      rewards: the rewards, NaN for an answer without one.
    """
    known = np.isfinite(rewards)
    high, low = np.where(known, rewards, -np.inf).max(axis=1), np.where(known, rewards, np.inf).min(axis=1)
    return high - low > _EQUAL
