"""Integers of 4 or 8 bits with a scale and a zero point per group of rows and output channel."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.models.quantized.packing import unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped(KernelArray):
    """(code - zero) * scale, as GPTQ, AWQ and compressed-tensors store kernels. G groups of D / G rows share both.

    Attributes:
      codes: of `bits` bits; of 4, two rows per byte.
      zero: the code of 0 in each group and output channel.
      scale: of each group and output channel.
      order: of each row of the kernel, the place of its code, where rows are stored group by group; None if the rows of
        a group are neighbours in the kernel.
      bits: 4 or 8.
    """

    codes: UInt8[Array, "*L Dc F"]
    zero: UInt8[Array, "*L G F"]
    scale: Float[Array, "*L G F"]
    order: Int[Array, "*L D"] | None = None
    bits: int = dataclasses.field(default=4, metadata={"static": True})

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        codes = unpack(self.codes) if self.bits == 4 else self.codes
        *leading, groups, columns = self.scale.shape
        zero, scale = (a.astype(jnp.float32)[..., None, :] for a in (self.zero, self.scale))
        grouped = codes.reshape(*leading, groups, -1, columns).astype(jnp.float32)
        values = ((grouped - zero) * scale).reshape(codes.shape)
        if self.order is None:
            return values
        return jnp.take_along_axis(values, self.order[..., None], axis=-2, mode="clip")
