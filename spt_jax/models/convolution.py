"""A convolution over the tokens of an encoder (DeBERTa-v2, He et al. 2021, arXiv 2006.03654)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.convolution_config import ConvolutionConfig
from spt_jax.models.layers import ACTIVATIONS, Linear


class TokenConvolution(nn.Module):
    """The activation of a convolution over the tokens of an example, with zeros before and after them.

    Its kernel is one linear map [D, D] for each of the tokens that it reads.
    """

    config: ConvolutionConfig

    @nn.compact
    @jax.named_scope("convolution")
    def __call__(self, x: Float[Array, "B T D"], segments: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        width, size = x.shape[-1], self.config.size
        bias = self.param("bias", nn.initializers.zeros, (width,))
        y = bias.astype(x.dtype).reshape(1, 1, -1)
        for tap in range(size):
            y = y + Linear(width, name=f"tap_{tap}")(shifted(x, segments, tap - size // 2))
        return jnp.tanh(y) if self.config.activation == "tanh" else ACTIVATIONS[self.config.activation](y)


def shifted(x: Float[Array, "B T D"], segments: Int[Array, "B T"], by: int) -> Float[Array, "B T D"]:
    """Returns for each token the one `by` places later in its example, or zeros if there is none.

    Args:
      x: the tokens of each row; those of an example follow one another.
      segments: the index of each token's example in its row.
      by: the distance, negative for earlier tokens.
    """
    front, back = max(-by, 0), max(by, 0)
    length = x.shape[1]

    def moved(a: Array) -> Array:
        return jnp.pad(a, [(0, 0), (front, back), *[(0, 0)] * (a.ndim - 2)])[:, back : back + length]

    same = moved(segments) == segments
    return jnp.where(same[..., None], moved(x), jnp.zeros((), x.dtype))
