"""Decomposed prompt tuning: a short soft prompt, and a low-rank update of the embeddings of the input.

DePT (Shi & Lipani 2024, arXiv 2309.05173).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.virtual import VirtualPrompt, shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecomposedPromptTuning(TokenMethod):
    """Virtual tokens, and a low-rank update of embeddings.

    Attributes:
      name: the method.
      init: initializer of the rows.
      span: number of first positions of a sequence, virtual tokens included, at which the embeddings of real tokens are
        updated.
      rank: rank of the update.
      change_rate: learning rate of the update relative to that of the rows (the paper has two learning rates).
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["decomposed_prompt_tuning"] = "decomposed_prompt_tuning"
    span: int = 128
    rank: int = 8
    change_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= self.span:
            raise ConfigError(f"method.rank is {self.rank}; it must be in 1 to the span, {self.span}")
        if not self.change_rate > 0:
            raise ConfigError(f"method.change_rate is {self.change_rate}; it must be above 0")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "..."]]:
        """Returns rows [P, D], and the factors [span, r] and [r, D] of the update, the second one zero; float32."""
        row_key, factor_key = jax.random.split(key)
        rows = initialize(self.init, row_key, base, self.token_count)
        left = jax.random.normal(factor_key, (self.span, self.rank)) * self.rank**-0.5
        return {"tokens": rows, "left": left, "right": jnp.zeros((self.rank, rows.shape[1]))}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows, and the update as left @ right, times a factor that scales its learning rate under Adam."""
        del model
        shift = self.change_rate * (params["left"] @ params["right"])
        return VirtualPrompt(tokens=params["tokens"], shift=shift, pinned=self.pins)

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the rows and the update."""
        return dataclasses.replace(super().spec(layout), shift=shape(self.span, layout.width))
