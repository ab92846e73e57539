"""Residual prompt tuning: rows plus the output of a small network (Razdaibiedina et al. 2023, arXiv 2305.03937)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.networks import init_linear, linear
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualPromptTuning(TokenMethod):
    """Virtual tokens plus a small network applied to them.

    Attributes:
      name: the method.
      init: initializer of the rows. The prompt starts at them, because the layer norm of the network has an initial
        scale of 0.
      bottleneck: width of the network, which all rows share. It is dropped when the prompt is saved.
      network_rate: learning rate of the network relative to that of the rows.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["residual_prompt_tuning"] = "residual_prompt_tuning"
    bottleneck: int = 128
    network_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck < 1:
            raise ConfigError(f"method.bottleneck is {self.bottleneck}; the network has at least 1 unit")
        if not self.network_rate > 0:
            raise ConfigError(f"method.network_rate is {self.network_rate}; it must be above 0")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns rows [P, D] and the network, float32."""
        row_key, down_key, up_key = jax.random.split(key, 3)
        width = base.layout.width
        network = {
            "down": init_linear(down_key, width, self.bottleneck),
            "up": init_linear(up_key, self.bottleneck, width),
            "norm": {"scale": jnp.zeros(width), "bias": jnp.zeros(width)},
        }
        # Divided here and multiplied in `materialize`, which scales the learning rate under Adam.
        network = jax.tree.map(lambda a: a / self.network_rate, network)
        return {"tokens": initialize(self.init, row_key, base, self.token_count), "network": network}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns rows + LayerNorm(up(ReLU(down(rows)))), section 3 of the paper."""
        del model
        rows = params["tokens"]
        network = jax.tree.map(lambda a: a * self.network_rate, params["network"])
        x = linear(network["up"], jax.nn.relu(linear(network["down"], rows)))
        x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        change = x * network["norm"]["scale"][None] + network["norm"]["bias"][None]
        return VirtualPrompt(tokens=rows + change, pinned=self.pins)
