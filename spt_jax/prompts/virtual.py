"""What every method ends in."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from spt_jax.models.attention import GatedPrefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys (after RoPE) and values of P positions before everything else, for all layers, float32.

    length: how many positions are real, where prompts of unequal length are stacked; None for all.
    """

    keys: Float[Array, "*S L P K H"]
    values: Float[Array, "*S L P K H"]
    length: Int[Array, "*S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A linear map from hidden states to C classes, which takes the place of the output matrix. float32."""

    kernel: Float[Array, "*S D C"]
    bias: Float[Array, "*S C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VirtualPrompt:
    """A soft prompt as the model sees it. Each part is optional.

    With an S axis it is S prompts at once, of which each row has its `Stream.prompt_index`.

    tokens: row i stands for the virtual id `vocab_size + i`, float32.
    shift: what is added to the embedding of a real token at each of the first positions.
    prefix: keys and values at the positions before the first token.
    gated: keys and values of the last layers behind a gate.
    head: a task's own output matrix.
    """

    tokens: Float[Array, "*S P D"] | None = None
    shift: Float[Array, "*S T D"] | None = None
    prefix: KeysValues | None = None
    gated: GatedPrefix | None = None
    head: Head | None = None

    @property
    def prefix_length(self) -> int:
        """Positions of the keys and values, padding of stacked prompts included; 0 without any."""
        return 0 if self.prefix is None else self.prefix.keys.shape[-3]

    @property
    def first_position(self) -> int | Int[Array, "*S"]:
        """The position of the first token after the prefix."""
        if self.prefix is None or self.prefix.length is None:
            return self.prefix_length
        return self.prefix.length
