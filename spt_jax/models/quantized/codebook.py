"""4-bit codes of 16 levels, with a scale per block of rows and output channel."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.models.quantized.packing import unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook(KernelArray):
    """levels[code] * scale. G blocks of D / G rows share the scale of an output channel.

    Attributes:
      packed: the codes, two rows per byte.
      scale: of each block and output channel.
      levels: the values of the 16 codes.
      rounded: the dtype to which products are rounded; None if they are not.
    """

    packed: UInt8[Array, "*L Dh F"]
    scale: Float[Array, "*L G F"]
    levels: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    rounded: jnp.dtype | None = dataclasses.field(default=None, metadata={"static": True})

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        codes = unpack(self.packed)
        *leading, groups, columns = self.scale.shape
        levels = jnp.take(jnp.asarray(self.levels, jnp.float32), codes, axis=0, mode="clip")
        values = levels.reshape(*leading, groups, -1, columns) * self.scale.astype(jnp.float32)[..., None, :]
        if self.rounded is not None:
            # Without the barrier, XLA leaves out a cast to fewer bits and back.
            values = jax.lax.optimization_barrier(values.astype(self.rounded)).astype(jnp.float32)
        return values.reshape(codes.shape)
