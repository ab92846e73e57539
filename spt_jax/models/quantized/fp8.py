"""8-bit floats with a scale per output channel."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from spt_jax.models.quantized.kernel_array import KernelArray

_TYPE = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_TYPE).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8(KernelArray):
    """float8_e4m3fn values (Micikevicius et al. 2022, arXiv 2209.05433) times a float32 scale per output channel.

    Attributes:
      values: floats of 4 bits of exponent and 3 of mantissa.
      scale: the scale of each of the F output channels.
    """

    values: Float[Array, "*L D F"]
    scale: Float[Array, "*L F"]

    @classmethod
    def encode(cls, kernel: Float[np.ndarray, "D F"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the values and scales; the largest value of a channel becomes 448, the largest of the type."""
        scale = np.maximum(np.abs(kernel).max(axis=0) / _LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
        return {"values": np.clip(kernel / scale, -_LARGEST, _LARGEST).astype(_TYPE), "scale": scale}

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        return self.values.astype(jnp.float32) * self.scale[..., None, :]
