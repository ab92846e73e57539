"""Low-rank prompt tuning: P frozen rows plus a trained matrix of rank r.

The factorized prompt of Guo et al. 2024 (arXiv 2406.19486), added to frozen rows as in LoRA (arXiv 2106.09685).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import PromptParams, TokenMethod
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankPromptTuning(TokenMethod):
    """Frozen virtual tokens plus a low-rank matrix.

    Attributes:
      name: the method.
      init: initializer of the frozen rows.
      rank: rank r, at most P; default 8, or P if that is less.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["low_rank_prompt_tuning"] = "low_rank_prompt_tuning"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and not 1 <= self.rank <= self.token_count:
            raise ConfigError(f"method.rank is {self.rank}; it must be in 1 to the length, {self.token_count}")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "..."]]:
        """Returns frozen rows [P, D], and the factors [P, r] and [r, D], the second one zero; float32."""
        row_key, factor_key = jax.random.split(key)
        rows = initialize(self.init, row_key, base, self.token_count)
        rank = self.rank or min(8, self.token_count)
        left = jax.random.normal(factor_key, (self.token_count, rank)) * rank**-0.5
        return {"start": rows, "left": left, "right": jnp.zeros((rank, rows.shape[1]))}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns start + left @ right as virtual tokens."""
        del model
        return VirtualPrompt(tokens=params["start"] + params["left"] @ params["right"], pinned=self.pins)

    def trainable(self, params: PromptParams) -> dict[str, bool]:
        """Only the factors are trained."""
        return {name: name != "start" for name in params}
