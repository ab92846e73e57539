"""ReFT: low-rank edits of the hidden states after every layer (Wu et al. 2024, arXiv 2404.03592)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.method import Method
from spt_jax.prompts.virtual import VirtualPrompt, shape

# The entries of A are in units of this number divided by the width, so that a learning rate changes h A equally for
# every width: an update of Adam changes each entry by about the rate, and h A is a sum over the width.
DOWN_UNIT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationFinetuning(Method):
    """Low-rank edits of hidden states after each layer.

    After each layer, the hidden state h of every token becomes h + (h A + rms(h) b) C, with A [D, r], b [r] and
    C [r, D] of that layer: DiReFT of Wu et al. 2024, with b in units of the root mean square of h (`HiddenEdits`).
    The authors edit some tokens at the start and at the end of the input. Here every token is edited, generated ones
    included, so that the edits depend on no position. They take no positions themselves, and training starts from the
    unchanged base, with C = 0.

    Attributes:
      name: the method.
      rank: the rank r.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.01, "schedule": "linear"}

    name: Literal["reft"] = "reft"
    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"method.rank is {self.rank}; it must be at least 1")

    def check_base(self, base: FrozenBase) -> None:
        """Checks the options against a base.

        Raises:
          ConfigError: the base is an encoder-decoder or takes input embeddings only, or the rank is above its width.
        """
        if base.layout.encodes:
            raise ConfigError(f"{self.name} does not support encoder-decoders, such as {base.name}")
        if self.rank > base.layout.layer_width:
            raise ConfigError(
                f"method.rank is {self.rank}; the layers of {base.name} have width {base.layout.layer_width}"
            )
        super().check_base(base)

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns `down` [L, D, r], `bias` [L, r] and `up` [L, r, D], the last two of zeros; float32.

        A is `down` in units of 64 / D, and normal with the variance 1 / D.

        Raises:
          ConfigError: as in `check_base`.
        """
        self.check_base(base)
        spec = self.spec(base.layout).edits
        assert spec is not None
        down = jax.random.normal(key, spec.down.shape) * (base.layout.layer_width**0.5 / DOWN_UNIT)
        return {"down": down, "bias": jnp.zeros(spec.bias.shape), "up": jnp.zeros(spec.up.shape)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the edits."""
        del model
        down, bias, up = (jnp.asarray(params[name]) for name in ("down", "bias", "up"))
        return VirtualPrompt(edits=HiddenEdits(down * (DOWN_UNIT / down.shape[1]), bias, up))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the edits."""
        layers, width, rank = layout.layer_count, layout.layer_width, self.rank
        edits = HiddenEdits(shape(layers, width, rank), shape(layers, rank), shape(layers, rank, width))
        return VirtualPrompt(edits=edits)
