"""LLaMA-Adapter: gated prompts in the last layers, with gates that start at 0 (Zhang et al. 2023, arXiv 2303.16199)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import GatedPrefix
from spt_jax.models.layout import Layout, only_layers
from spt_jax.models.model import Model
from spt_jax.prompts.method import DEFAULT_LENGTH, Method
from spt_jax.prompts.virtual import VirtualPrompt, shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    """Gated prompts in the last layers.

    In each of these layers, every token attends to the prompt of the layer under a separate softmax. The result is
    multiplied by the gate of the layer and added to its attention output. With gates of 0, training starts from the
    unchanged frozen base.

    Attributes:
      name: the method.
      length: number of rows P in each layer; default 20.
      layers: number of last layers with a prompt; default all but the first two.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["llama_adapter"] = "llama_adapter"
    length: int | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"method.{name} is {value}; it must be at least 1")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "..."]]:
        """Returns standard normal rows [G, P, D], like normalized hidden states, and gates [G] of 0; float32.

        Raises:
          ConfigError: the base has fewer than `layers` layers, or they are not as wide as its embeddings.
        """
        if base.layout.width != base.config.width:
            raise ConfigError(f"{base.name}: llama_adapter needs embeddings as wide as the layers")
        layers, available = self._layers(base.layout), len(base.layout.attention_layers)
        if layers > available:
            raise ConfigError(f"method.layers is {layers}; {base.name} has {available} layers with attention")
        rows = jax.random.normal(key, (layers, self.length or DEFAULT_LENGTH, base.layout.width))
        return {"rows": rows, "gates": jnp.zeros(layers)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the keys and values that each layer computes from its rows, without RoPE (no positions)."""
        rows = jnp.asarray(params["rows"])
        return VirtualPrompt(gated=GatedPrefix(model.gated_memory(rows), params["gates"], rows))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the gated keys and values of the last G layers, their gates and rows."""
        layers, length = self._layers(layout), self.length or DEFAULT_LENGTH
        groups = only_layers(layout.attention_groups, layout.attention_layers[-layers:])
        return VirtualPrompt(
            gated=GatedPrefix(memory.spec(groups, length), shape(layers), shape(layers, length, layout.width))
        )

    def _layers(self, layout: Layout) -> int:
        return self.layers or max(1, len(layout.attention_layers) - 2)
