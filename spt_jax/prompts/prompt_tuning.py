"""Prompt tuning: P trained rows in the input embeddings (Lester et al. 2021, arXiv 2104.08691)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.task_head import HeadMethod
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(HeadMethod, TokenMethod):
    """Trained rows among the input embeddings.

    The prompt has a head if the task has one.

    Attributes:
      name: the method.
    """

    name: Literal["prompt_tuning"] = "prompt_tuning"

    def __post_init__(self) -> None:
        TokenMethod.__post_init__(self)
        HeadMethod.__post_init__(self)

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns initial rows [P, D], and the head; float32.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        return {"tokens": initialize(self.init, key, base, self.token_count), **self.init_head(base)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows as virtual tokens, and the head."""
        del model
        return self.with_head(VirtualPrompt(tokens=jnp.asarray(params["tokens"]), pinned=self.pins), params)
