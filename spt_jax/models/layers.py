"""Layers of a decoder: linear layers, norms, rotary embedding, MLP."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.config import DecoderConfig
from spt_jax.models.quantized import KernelArray

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def dense(kernel: Float[Array, "*L D F"] | KernelArray) -> Float[Array, "*L D F"]:
    """Returns a kernel as a dense float32 array."""
    return kernel.dense() if isinstance(kernel, KernelArray) else kernel.astype(jnp.float32)


def linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"] | KernelArray, bias: Float[Array, " F"] | None = None
) -> Float[Array, "*B F"]:
    """Returns x @ kernel + bias in the dtype of x. All linear maps of the layers use this function."""
    y = kernel.matmul(x) if isinstance(kernel, KernelArray) else jnp.dot(x, kernel.astype(x.dtype))
    if bias is None:
        return y
    return y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Linear(nn.Module):
    """A linear layer with a kernel [D, features] and an optional bias."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape = (x.shape[-1],)
        leading = (1,) * (x.ndim - 1)
        scale = self.param("scale", nn.initializers.ones, shape)
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_epsilon)
        scale = scale.astype(jnp.float32) + (1.0 if self.config.norm == "rms_around" else 0.0)
        y = y * scale.reshape(*leading, -1)
        if self.config.norm == "layer":
            bias = self.param("bias", nn.initializers.zeros, shape)
            y = y + bias.astype(jnp.float32).reshape(*leading, -1)
        return y.astype(x.dtype)


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) for families without a gate."""

    config: DecoderConfig

    @nn.compact
    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        up = Linear(config.mlp_width, config.mlp_bias, name="up")(x)
        if config.gated_mlp:
            hidden = activation(Linear(config.mlp_width, config.mlp_bias, name="gate")(x)) * up
        else:
            hidden = activation(up)
        return Linear(config.width, config.mlp_bias, name="down")(hidden)


def rotation(config: DecoderConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array] | None:
    """Returns cosines and sines of the RoPE angles, float32 [B, T, H / 2]; None for families without RoPE."""
    if config.rope is None:
        return None
    frequencies = jnp.asarray(config.rope.inverse_frequencies(config.head_size))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * config.rope.attention_factor, jnp.sin(angles) * config.rope.attention_factor


def rotate(x: Float[Array, "B T N H"], cos_sin: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by their angles, in float32 (the layout of Hugging Face checkpoints)."""
    cos, sin = (part[:, :, None] for part in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
