"""State tuning: the states of recurrent layers before the first token (S0 tuning, Young 2026, arXiv 2604.01168)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.layout import Layout
from spt_jax.models.memory import Memory, State
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize, vocabulary
from spt_jax.prompts.method import DEFAULT_LENGTH, Method, PromptParams
from spt_jax.prompts.prefix_tuning import memory_of_rows, start_states
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt

# The array of a state that holds the last inputs of a causal convolution.
CONVOLUTION = "convolution"

# By the name of the group of layers and of the array.
Arrays = Mapping[str, Mapping[str, Float[Array, "..."]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTuning(Method):
    """States of recurrent layers before the first token.

    The prompt takes no positions: the recurrent layers start from trained states in place of zeros, and all else is as
    without it.

    Attributes:
      name: the method.
      noise: deviation of the normal initial states, in units of the base's own; 0 starts from zeros, as the paper does.
      path: a saved prompt whose states are the initial ones, of this method or of prefix_tuning with `states`.
      convolutions: also train the inputs that the causal convolutions of the recurrent layers read before the first
        token. The paper trains only the states of the recurrence.
    """

    # In units of the states of the base. On random bases of 30,000 parameters the loss still falls faster with 1 and 3;
    # trained bases react more to their states, and the paper's steps are smaller.
    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.3, "schedule": "linear"}

    name: Literal["state_tuning"] = "state_tuning"
    noise: float = 0.0
    path: str = ""
    convolutions: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"method.noise is {self.noise}; it must be a finite number of at least 0")
        if self.noise and self.path:
            raise ConfigError(f"method.noise is {self.noise}, and method.path names initial states; give only one")

    def check_base(self, base: FrozenBase) -> None:
        """Checks that the base has recurrent layers.

        Raises:
          ConfigError: it has none.
        """
        if not base.layout.state_groups:
            raise ConfigError(
                f"state_tuning needs recurrent layers, and {base.name} has none; prefix_tuning trains keys and values"
            )

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns `states` and their `scale`, by the name of the group and of the array; float32.

        The states are in units of `scale`, the standard deviation of each array after 20 tokens of the vocabulary, so
        that a learning rate has the same effect for every base.

        Raises:
          ConfigError: the base has no recurrent layers, or `path` is a prompt without states.
        """
        self.check_base(base)
        row_key, noise_key = jax.random.split(key)
        found = memory_of_rows(base.model, initialize(vocabulary(), row_key, base, DEFAULT_LENGTH))
        scale = jax.tree.map(lambda a: jnp.maximum(a.std(), 1e-6), self._trained(found))
        start = self._trained(memory.of_all_layers(self._saved(base), base.layout))
        if not jax.tree.leaves(start):
            raise ConfigError(f"{base.name} remembers only inputs of convolutions; set method.convolutions to True")
        leaves, structure = jax.tree.flatten(start)
        keys = structure.unflatten(jax.random.split(noise_key, len(leaves)))
        states = jax.tree.map(
            lambda own, unit, key: own / unit + self.noise * jax.random.normal(key, own.shape), start, scale, keys
        )
        return {"states": states, "scale": scale}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the states of all recurrent layers; those that are not trained are zeros."""
        trained: Arrays = jax.tree.map(jnp.multiply, params["states"], params["scale"])
        whole = {name: State({**arrays, **trained[name]}) for name, arrays in start_states({}, model.layout).items()}
        return VirtualPrompt(prefix=VirtualPrefix(whole))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the states."""
        return VirtualPrompt(prefix=VirtualPrefix(memory.state_spec(layout.state_groups)))

    def trainable(self, params: PromptParams) -> dict[str, Any]:
        """The scale is not trained."""
        return {name: jax.tree.map(lambda _, name=name: name == "states", part) for name, part in params.items()}

    def _trained(self, whole: Memory) -> dict[str, dict[str, Array]]:
        """Returns the arrays that are trained."""
        return {
            name: {key: array for key, array in own.arrays.items() if self.convolutions or key != CONVOLUTION}
            for name, own in whole.items()
            if isinstance(own, State)
        }

    def _saved(self, base: FrozenBase) -> Memory:
        """Returns the states of the prompt that `path` names, or nothing if it names none."""
        if not self.path:
            return {}
        from spt_jax.prompts.storage import load_prompt

        prefix = load_prompt(self.path, base).virtual.prefix
        found = {} if prefix is None else {k: own for k, own in prefix.memory.items() if isinstance(own, State)}
        if not found:
            raise ConfigError(f"method.path is {self.path!r}, a prompt without states of recurrent layers")
        tails = [array for own in found.values() for name, array in own.arrays.items() if name == CONVOLUTION]
        if not self.convolutions and any(tail.any() for tail in tails):
            raise ConfigError(f"{self.path}: has inputs of convolutions; set method.convolutions to True to train them")
        return found
