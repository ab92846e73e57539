"""Layers of a decoder: linear layers, norms, MLP."""

import functools
import math
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from spt_jax.models.config import DecoderConfig
from spt_jax.models.quantized import KernelArray, TableArray
from spt_jax.runtime.sharding import ROWS, constrain, row_shards

Quantized = TypeVar("Quantized", KernelArray, TableArray)

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def dense(leaf: Float[Array, "..."] | KernelArray | TableArray) -> Float[Array, "..."]:
    """Returns a kernel, a table, or another leaf of the parameters, as a dense float32 array."""
    return leaf.dense() if isinstance(leaf, KernelArray | TableArray) else leaf.astype(jnp.float32)


def linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"] | KernelArray, bias: Float[Array, " F"] | None = None
) -> Float[Array, "*B F"]:
    """Returns x @ kernel + bias in the dtype of x. All linear maps of the layers use this function."""
    y = kernel.matmul(x) if isinstance(kernel, KernelArray) else jnp.dot(x, kernel.astype(x.dtype))
    if bias is None:
        return y
    return y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def kernel_param(module: nn.Module, shape: tuple[int, ...]) -> Float[Array, "*L D F"] | KernelArray:
    """Returns the parameter `kernel` of a module, which may be a `KernelArray`."""
    return _param(module, "kernel", shape, KernelArray)


def table_param(module: nn.Module, name: str, shape: tuple[int, int]) -> Float[Array, "..."] | TableArray:
    """Returns a matrix of a module with a row or column per token, which may be an `TableArray`."""
    return _param(module, name, shape, TableArray)


def _param(module: nn.Module, name: str, shape: tuple[int, ...], kind: type[Quantized]) -> Array | Quantized:
    """Returns a parameter; Linen checks the shape of an array and of nothing else."""
    if module.has_variable("params", name):
        found = module.get_variable("params", name)
        if isinstance(found, kind):
            return found
    return module.param(name, nn.initializers.normal(0.02), shape)


def table_rows(table: Float[Array, "V D"] | TableArray, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Returns rows of a table by token; ids must be in [0, V)."""
    return table.take(ids) if isinstance(table, TableArray) else jnp.take(table, ids, axis=0)


def scaled(x: Float[Array, "*B D"], scale: float | None) -> Float[Array, "*B D"]:
    """Returns x times a factor, in the dtype of x; x itself if there is none."""
    return x if scale is None or scale == 1 else x * jnp.asarray(scale, x.dtype)


def take_rows(
    mesh: Mesh | None, table: Float[Array, "V D"] | TableArray, ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Computes `table_rows(table, ids)` for a table with V, and ids with rows, split over fsdp.

    Each device looks up the tokens of all fsdp devices in its shard of the table, and XLA sums the parts on the devices
    of the rows. In chunks, the temporary memory of a device does not exceed that of its rows of the result.
    """
    (batch, length), width = ids.shape, table.shape[1]
    if mesh is None or mesh.shape["fsdp"] == 1 or batch % row_shards(mesh):
        return table_rows(table, ids)
    parts = math.gcd(length, mesh.shape["sequence"])
    count = math.gcd(length // parts, mesh.shape["fsdp"])
    chunks = jnp.moveaxis(ids.reshape(batch, parts, count, length // parts // count), 2, 0)
    taken = jax.lax.map(lambda chunk: constrain(mesh, table_rows(table, chunk), ROWS, "sequence"), chunks)
    return constrain(mesh, jnp.moveaxis(taken, 0, 2).reshape(batch, length, width), ROWS, "sequence")


class Linear(nn.Module):
    """A linear layer with a kernel [D, features] and an optional bias."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = kernel_param(self, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis, computed in float32.

    Attributes:
      config: the kind of norm.
      scale_shape: shape of the scale, which is broadcast against x from the right; default the last axis.
      use_scale: whether there is a scale, if the config's norms have one.
      use_bias: whether a LayerNorm has a bias, if the config's have one.
    """

    config: DecoderConfig
    scale_shape: tuple[int, ...] | None = None
    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        config, shape = self.config, self.scale_shape or (x.shape[-1],)
        leading = (1,) * (x.ndim - len(shape))
        y = x.astype(jnp.float32)
        if config.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon)
        if self.use_scale and config.norm_scale:
            scale = self.param("scale", nn.initializers.ones, shape)
            y = y * (scale.astype(jnp.float32) + config.norm_offset).reshape(*leading, *shape)
        if config.norm == "layer" and self.use_bias and config.norm_bias:
            bias = self.param("bias", nn.initializers.zeros, shape)
            y = y + bias.astype(jnp.float32).reshape(*leading, *shape)
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
            gate = Linear(config.mlp_width, config.mlp_bias, name="gate")(x)
            hidden = activation(scaled(gate, config.mlp_gate_scale)) * up
        else:
            hidden = activation(up)
        return scaled(Linear(config.width, config.mlp_bias, name="down")(hidden), config.mlp_output_scale)
