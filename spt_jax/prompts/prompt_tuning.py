"""Prompt tuning: P trained rows in the input embeddings (Lester et al. 2021, arXiv 2104.08691)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(TokenMethod):
    """Trained rows among the input embeddings.

    Attributes:
      name: the method.
    """

    name: Literal["prompt_tuning"] = "prompt_tuning"

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "P D"]]:
        """Returns initial rows, float32."""
        return {"tokens": initialize(self.init, key, base, self.token_count)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows as virtual tokens."""
        del model
        return VirtualPrompt(tokens=jnp.asarray(params["tokens"]), pinned=self.pins)
