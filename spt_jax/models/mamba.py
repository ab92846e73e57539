"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): the recurrent layer of Granite 4 and Falcon-H1.

Per head, a matrix S of values by keys is decayed, and every token adds to it:

    S_i = exp(a_i) S_(i-1) + d_i x_i b_i^T,    y_i = S_i c_i + D x_i

In the paper's terms of attention, c is a query, b a key and d x a value. "Before" is the relation of `TokenOrder`. A
row is computed by chunks (section 6 of the paper). With G_i the sum of a over token i and the tokens of its chunk
before it, and S_0 the state after the nearest token before token i in an earlier chunk,

    S_i c_i = exp(G_i) S_0 c_i + sum over j before i in its chunk, and i itself, of exp(G_i - G_j) (c_i . b_j) d_j x_j
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.models.layers import Linear, scaled
from spt_jax.models.mamba_config import CHUNK, MambaConfig
from spt_jax.models.memory import State
from spt_jax.models.recurrence import (
    Chunk,
    ChunkResult,
    GatedNorm,
    TokenOrder,
    by_chunks,
    convolve,
    decay_sums,
    decayed,
    end_states,
)


class SpaceInputs(NamedTuple):
    """Inputs of a state space, float32. N = K R heads; R consecutive ones share a query and a key.

    Attributes:
      queries: c.
      keys: b.
      values: d x.
      decays: a, the logarithm of the decay of the state at each token, at most 0.
    """

    queries: Float[Array, "B T K H"]
    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K R Hv"]
    decays: Float[Array, "B T K R"]


@jax.named_scope("state_space")
def state_space(chunk: Chunk[SpaceInputs], states: Float[Array, "S B K R Hv H"]) -> ChunkResult:
    """Computes a state space (Dao & Gu 2024, equation 16) over a chunk of tokens, without D x."""
    queries, keys, values, decays = chunk.inputs
    by_head = jnp.moveaxis(decays, 1, -1)
    sums = decay_sums(chunk.mask, by_head)
    products = jnp.einsum("btkh,bskh->bkts", queries, keys)[:, :, None]
    own = jnp.einsum("bkrts,bskrv->btkrv", products * decayed(sums, sums, chunk.mask), values)
    choices = jnp.einsum("btkh,bts->btskh", queries, chunk.base.astype(jnp.float32))
    grown = jnp.moveaxis(jnp.exp(jnp.sum(sums, axis=0)), -1, 1)[..., None]
    outputs = own + grown * jnp.einsum("btskh,sbkrvh->btkrv", choices, states)

    def written(weights: Float[Array, "B K R E T"]) -> Float[Array, "E B K R Hv H"]:
        return jnp.einsum("bkres,bskh,bskrv->ebkrvh", weights, keys, values)

    return ChunkResult(outputs, end_states(chunk, by_head, sums, states, written))


class Mamba2(nn.Module):
    """One Mamba-2 layer, the counterpart of `Attention` in recurrent layers.

    The state, float32, has two arrays: "convolution" [B, C, N Hv + 2 K H], the inputs of the convolution (values, keys,
    queries) at the last C = convolution_width - 1 tokens, and "recurrent" [B, N, Hv, H]. Every example of a row starts
    from the state that is passed, at any position. The state that is returned is that after the last token of each row
    that has no parent; padding is no token, and a row of padding keeps its state.

    Attributes:
      config: sizes of the layer.
      chunk: tokens of a chunk of a long row.
    """

    config: MambaConfig
    chunk: int = CHUNK

    @nn.compact
    @jax.named_scope("mamba")
    def __call__(
        self, x: Float[Array, "B T D"], order: TokenOrder, state: State
    ) -> tuple[Float[Array, "B T D"], State]:
        """Applies the layer to rows of tokens.

        Args:
          x: hidden states.
          order: the order of the tokens, with C = convolution_width - 1.
          state: the state before the rows; without the axis B, one that all rows share.

        Returns:
          The output in the dtype of x, and the state after the rows, float32.
        """
        config = self.config
        batch, length, width = x.shape
        groups, repeats = config.groups, config.heads // config.groups
        tail, recurrent = (
            jnp.broadcast_to(state.arrays[name].astype(jnp.float32), (batch, *shape))
            for name, shape in config.state_shapes
        )
        x = scaled(x, config.input_scale)
        sizes = {"value": config.value_width, "key": config.key_width, "query": config.key_width}
        ends = config.value_width, config.value_width + config.key_width
        tails: dict[str, Array] = dict(zip(sizes, jnp.split(tail, ends, axis=-1), strict=True))
        scales: dict[str, float] = dict(zip(("gate", "value", "key", "query", "step"), config.part_scales, strict=True))

        def part(name: str, size: int) -> Float[Array, "B T F"]:
            return scaled(Linear(size, config.input_bias, name=name)(x), scales[name])

        def convolved(name: str) -> Float[Array, "B T F"]:
            shape = config.convolution_width, sizes[name]
            kernel = self.param(f"{name}_convolution", nn.initializers.normal(0.02), shape)
            y, tails[name] = convolve(part(name, sizes[name]), kernel, tails[name], order)
            if config.convolution_bias:
                bias = self.param(f"{name}_convolution_bias", nn.initializers.zeros, shape[1:])
                y = y + bias.astype(jnp.float32)[None, None]
            return jax.nn.silu(y)

        def of_heads(name: str, start: nn.initializers.Initializer) -> Float[Array, "1 1 N"]:
            return self.param(name, start, (config.heads,)).astype(jnp.float32)[None, None]

        values = convolved("value").reshape(batch, length, config.heads, config.head_size)
        keys, queries = (convolved(name).reshape(batch, length, groups, -1) for name in ("key", "query"))
        steps = part("step", config.heads).astype(jnp.float32)
        steps = jax.nn.softplus(steps + of_heads("dt_bias", nn.initializers.ones))
        decays = -jnp.exp(of_heads("a_log", nn.initializers.zeros)) * steps

        by_group = functools.partial(jnp.reshape, shape=(batch, length, groups, repeats, -1))
        inputs = SpaceInputs(queries, keys, by_group(values * steps[..., None]), by_group(decays)[..., 0])
        initial = recurrent.reshape(batch, groups, repeats, config.head_size, config.state_size)
        outputs, final = by_chunks(state_space, inputs, initial, order, self.chunk)

        skip = of_heads("skip", nn.initializers.ones)[..., None]
        outputs = (outputs.reshape(values.shape) + skip * values).reshape(batch, length, groups, -1)
        gate = part("gate", config.value_width).reshape(outputs.shape)
        if config.norm == "none":
            outputs = outputs * jax.nn.silu(gate.astype(jnp.float32))
        else:
            gate_first = config.norm == "gate_first"
            outputs = GatedNorm(config.norm_epsilon, scale_axes=2, gate_first=gate_first, name="norm")(outputs, gate)
        outputs = outputs.astype(x.dtype).reshape(batch, length, config.value_width)
        y = scaled(Linear(width, config.output_bias, name="output")(outputs), config.output_scale)
        convolution = jnp.concatenate([tails[name] for name in sizes], axis=-1)
        return y, State({"convolution": convolution, "recurrent": final.reshape(recurrent.shape)})
