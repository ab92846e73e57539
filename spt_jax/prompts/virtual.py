"""What every method ends in."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VirtualPrompt:
    """A soft prompt as the model sees it.

    tokens: row i stands for the virtual id `vocab_size + i`, float32.
    """

    tokens: Float[Array, "P D"]
