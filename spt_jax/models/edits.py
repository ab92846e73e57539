"""Low-rank edits of hidden states between layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TINY = 1e-30  # keeps the derivative of a root at 0 finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenEdits:
    """A low-rank edit of the hidden states after each layer.

    DiReFT (Wu et al. 2024, arXiv 2404.03592, section 3.2) replaces the hidden state h of a token by h + (h A + b) C.
    Here b is in units of the root mean square of h, so that an edit means the same for small and large hidden states:

        h + (h A + rms(h) b) C

    The axes before those below are the layers L, and before them S if there are S stacked prompts. What one layer is
    given has no L, and a B axis if each row has its own.

    Attributes:
      down: A.
      bias: b.
      up: C.
    """

    down: Float[Array, "*L D r"]
    bias: Float[Array, "*L r"]
    up: Float[Array, "*L r D"]


@jax.named_scope("edits")
def edited(x: Float[Array, "B T D"], edits: HiddenEdits) -> Float[Array, "B T D"]:
    """Returns hidden states after the edit of their layer, in their own precision.

    Args:
      x: the hidden states.
      edits: those of the layer, which all rows share or with a B axis, float32.
    """

    def product(a: Array, b: Array) -> Array:
        # Cast here, so that the cotangents of all rows are summed in float32.
        return jnp.matmul(a.astype(x.dtype), b.astype(x.dtype), preferred_element_type=jnp.float32)

    size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + TINY)
    read = product(x, edits.down) + size * edits.bias.reshape(-1, 1, edits.bias.shape[-1])
    return (x.astype(jnp.float32) + product(read, edits.up)).astype(x.dtype)
