"""int8 with a scale per output channel."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from spt_jax.models.quantized.kernel_array import KernelArray


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
    def encode(cls, kernel: Float[np.ndarray, "D F"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the integers and scales; the largest value of a channel becomes 127."""
        scale = np.maximum(np.abs(kernel).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        return {"values": np.rint(kernel / scale).astype(np.int8), "scale": scale}

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x @ kernel. Products are float32 until scaled: before, they may overflow float16."""
        return _product(self, x)

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        return self.values.astype(jnp.float32) * self.scale[..., None, :]


@jax.custom_vjp
def _product(kernel: Int8, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """Returns x @ kernel; nothing of the size of the kernel is saved for the backward pass, except the integers."""
    y = jnp.dot(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * kernel.scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def _forward(kernel: Int8, x: Array) -> tuple[Array, Int8]:
    return _product(kernel, x), kernel


def _backward(kernel: Int8, cotangent: Array) -> tuple[None, Array]:
    scale = kernel.scale.reshape((1,) * (cotangent.ndim - 1) + (-1,))
    scaled = (cotangent.astype(jnp.float32) * scale).astype(cotangent.dtype)
    return None, jnp.dot(scaled, kernel.values.astype(cotangent.dtype).T)


_product.defvjp(_forward, _backward)
