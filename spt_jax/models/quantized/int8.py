"""int8 with a scale per output channel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num

from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.runtime.host_arrays import aligned_empty, put_on_devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(KernelArray):
    """int8 values times a float32 scale per output channel.

    Attributes:
      values: the integers.
      scale: the scale of each of the F output channels.
    """

    values: Num[Array, "*L D F"]
    scale: Float[Array, "*L F"]

    @classmethod
    def quantize(cls, kernel: Float[np.ndarray, "*L D F"], sharding: NamedSharding) -> "Int8":
        """Quantizes one layer or expert at a time to save host memory; the largest value of a channel becomes 127."""
        values = aligned_empty(kernel.shape, np.int8)
        scale = aligned_empty((*kernel.shape[:-2], kernel.shape[-1]), np.float32)
        for i in np.ndindex(kernel.shape[:-2]):
            scale[i] = np.maximum(np.abs(kernel[i]).max(axis=0) / 127, np.finfo(np.float32).tiny)
            values[i] = np.rint(kernel[i] / scale[i])
        *leading, _, columns = (*sharding.spec, *(None,) * kernel.ndim)[: kernel.ndim]
        of_scale = NamedSharding(sharding.mesh, PartitionSpec(*leading, columns))
        return cls(put_on_devices(values, sharding), put_on_devices(scale, of_scale))

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x @ kernel. Products are float32 until scaled: before, they may overflow float16."""
        y = jnp.dot(x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * self.scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        return self.values.astype(jnp.float32) * self.scale[..., None, :]
