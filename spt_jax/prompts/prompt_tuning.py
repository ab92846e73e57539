"""Prompt tuning: P trained rows among the input embeddings (Lester et al. 2021, arXiv 2104.08691)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import Params
from spt_jax.prompts.initializers import Initializer, initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, Method
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """The hyper-parameters of prompt tuning.

    Attributes:
      name: the method.
      length: virtual tokens P; default the sum of the template's `<soft:n>`, or 20.
      init: where the rows start.
    """

    name: Literal["prompt_tuning"] = "prompt_tuning"
    length: int | None = None
    init: Initializer = dataclasses.field(default_factory=Initializer)

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a soft prompt has at least 1 virtual token")

    @property
    def token_count(self) -> int:
        """Virtual tokens that a template must place."""
        return self.length or DEFAULT_LENGTH

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "P D"]]:
        """Fresh rows, float32."""
        return {"tokens": initialize(self.init, key, base, self.token_count)}

    def materialize(self, module: Decoder, frozen: Params, params: Mapping[str, Any]) -> VirtualPrompt:
        """The rows are the parameters."""
        del module, frozen
        return VirtualPrompt(tokens=jnp.asarray(params["tokens"]))
