"""Context-aware prompt tuning: real tokens, each trained within a ball (Blau et al. 2024, arXiv 2410.17222)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from spt_jax.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import Params
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, PromptParams, TokenMethod
from spt_jax.prompts.virtual import VirtualPrompt

INPUT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextPromptTuning(TokenMethod):
    """The hyper-parameters of context-aware prompt tuning.

    Attributes:
      name: the method.
      init: the real tokens of the context; with init.name=text a text, tiled or trimmed to P.
      kinds: what each of the P tokens is, modulo 4: 1 an input's format, 2 an input's words, 3 an output's format, 0 a
        label, which stays as it is. Default 2 for all.
      epsilon: how far, in units of sqrt(D / 2048), the words may go from where they start.
      format_epsilon: how far format tokens may.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["cpt"] = "cpt"
    kinds: tuple[int, ...] = ()
    epsilon: float = 10.0
    format_epsilon: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds and self.length is not None and len(self.kinds) != self.length:
            raise ConfigError(f"method.kinds has {len(self.kinds)} numbers for {self.length} virtual tokens")
        if min((self.epsilon, self.format_epsilon, *self.kinds)) < 0:
            raise ConfigError("method.epsilon, method.format_epsilon and method.kinds must be at least 0")

    @property
    def token_count(self) -> int:
        """Virtual tokens that a template must place."""
        return self.length or len(self.kinds) or DEFAULT_LENGTH

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "P D"]]:
        """The context's embeddings and how far each is from them: nothing yet. float32."""
        rows = initialize(self.init, key, base, self.token_count)
        return {"start": rows, "delta": jnp.zeros_like(rows)}

    def materialize(self, module: Decoder, frozen: Params, params: Mapping[str, Any]) -> VirtualPrompt:
        """start + delta; labels have no gradient."""
        del module, frozen
        free = jnp.asarray(self._radii(1) > 0, jnp.float32)[:, None]
        return VirtualPrompt(tokens=params["start"] + free * params["delta"])

    def trainable(self, params: PromptParams) -> dict[str, bool]:
        """The difference."""
        return {name: name == "delta" for name in params}

    def project(self, params: PromptParams) -> PromptParams:
        """Every token's difference, put back into its ball."""
        delta = params["delta"]
        radii = jnp.asarray(self._radii(delta.shape[1]))
        norms = jnp.linalg.norm(delta, axis=1)
        shrink = jnp.where(norms > radii, radii / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny), 1.0)
        return {**params, "delta": delta * shrink[:, None]}

    def _radii(self, width: int) -> np.ndarray:
        kinds = np.asarray(self.kinds or [INPUT] * self.token_count) % 4
        scale = math.sqrt(width / 2048)
        return np.select([kinds == INPUT, kinds > 0], [self.epsilon * scale, self.format_epsilon * scale], 0.0).astype(
            np.float32
        )
