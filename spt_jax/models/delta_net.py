"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the recurrent layer of Qwen3-Next and Qwen3.5.

Per value head, a matrix S of keys by values is decayed and corrected at every token:

    S_i = exp(g_i) S_(i-1) + k_i u_i^T,    u_i = beta_i (v_i - exp(g_i) S_(i-1)^T k_i),    o_i = S_i^T q_i

"Before" is the relation of `TokenOrder`, and not the order in the row, which is computed by chunks. With G_i the sum of
g over token i and the tokens of its chunk before it, and S_0 the state after the nearest token before token i in an
earlier chunk, unrolling the recurrence gives

    u_i = beta_i (v_i - exp(G_i) S_0^T k_i - sum over j before i of exp(G_i - G_j) (k_i . k_j) u_j)
    o_i = exp(G_i) S_0^T q_i + sum over j before i, and i itself, of exp(G_i - G_j) (q_i . k_j) u_j

with j in the chunk of i, which is one triangular system per head.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.delta_net_config import CHUNK, DeltaNetConfig
from spt_jax.models.layers import Linear
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
    exact_einsum,
)

# Added to the squared length of queries and keys before they are divided by their length.
LENGTH_EPSILON = 1e-6


class DeltaInputs(NamedTuple):
    """Inputs of the gated delta rule, float32. N = K R value heads; R consecutive ones share a key head.

    Attributes:
      queries: scaled queries.
      keys: keys of length 1.
      values: values.
      decays: logarithm of the decay of the state at each token, at most 0.
      betas: how much of its correction each token writes, from 0 to 1.
    """

    queries: Float[Array, "B T K H"]
    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K R Hv"]
    decays: Float[Array, "B T K R"]
    betas: Float[Array, "B T K R"]


@jax.named_scope("delta_rule")
def delta_rule(chunk: Chunk[DeltaInputs], states: Float[Array, "S B K R H Hv"]) -> ChunkResult:
    """Computes the gated delta rule (Yang et al. 2024, equation 10) over a chunk of tokens."""
    queries, keys, values, decays, betas = chunk.inputs
    length = keys.shape[1]
    by_head, factors = jnp.moveaxis(decays, 1, -1), jnp.moveaxis(betas, 1, -1)[..., None]
    sums = decay_sums(chunk.mask, by_head)
    weights, grown = decayed(sums, sums, chunk.mask), jnp.exp(jnp.sum(sums, axis=0))[..., None]
    both, base = jnp.concatenate([queries, keys], axis=1), jnp.concatenate([chunk.base, chunk.base], axis=1)
    choices = exact_einsum("btkh,bts->btskh", both, base.astype(jnp.float32))
    read = exact_einsum("btskh,sbkrhv->bkrtv", choices, states)
    products = exact_einsum("btkh,bskh->bkts", both, keys)[:, :, None]

    updates = factors * (jnp.moveaxis(values, 1, 3) - grown * read[..., length:, :])
    if length > 1:
        updates = _solve(factors * products[..., length:, :] * weights, updates)
    own = exact_einsum("bkrts,bkrsv->bkrtv", products[..., :length, :] * weights, updates)
    outputs = jnp.moveaxis(grown * read[..., :length, :] + own, 3, 1)

    def written(weights: Float[Array, "B K R E T"]) -> Float[Array, "E B K R H Hv"]:
        return exact_einsum("bkres,bskh,bkrsv->ebkrhv", weights, keys, updates)

    return ChunkResult(outputs, end_states(chunk, by_head, sums, states, written))


def _solve(system: Float[Array, "B K R T T"], targets: Float[Array, "B K R T Hv"]) -> Float[Array, "B K R T Hv"]:
    """Solves (I + L) x = y for the part L of a matrix below its diagonal.

    Only matrix products are used: with XLA's triangular solver (jax 0.10.2), a gradient over four blocks did not end
    on two CPU cores. Of x = (I + L)^-1 (y - dL x), the inverse and the x on the right are constants to differentiation.
    """
    lower = jnp.tril(system, -1)
    inverse = _inverse(jax.lax.stop_gradient(lower))
    found = exact_einsum("bkrts,bkrsv->bkrtv", inverse, jax.lax.stop_gradient(targets))
    change = exact_einsum("bkrts,bkrsv->bkrtv", lower - jax.lax.stop_gradient(lower), found)
    return exact_einsum("bkrts,bkrsv->bkrtv", inverse, targets - change)


def _inverse(lower: Float[Array, "B K R T T"]) -> Float[Array, "B K R T T"]:
    """Returns (I + L)^-1 of a matrix L below the diagonal, from the inverses of ever larger blocks on the diagonal.

    Of [[P, 0], [C, Q]] the inverse is [[P', 0], [-Q' C P', Q']], where P' and Q' are the inverses of P and Q. All
    levels have the shape of the whole matrix, so that one loop body is compiled.
    """
    length = lower.shape[-1]
    places = jnp.arange(length)

    def double(level: Int[Array, ""], inverse: Float[Array, "B K R T T"]) -> Float[Array, "B K R T T"]:
        number = places >> level  # of the block that each row or column is in
        corners = (number[:, None] == number[None] + 1) & (number[:, None] % 2 == 1)
        shown = jnp.where(corners[None, None, None], lower, 0.0)
        return inverse - exact_einsum("bkrit,bkrtu,bkruj->bkrij", inverse, shown, inverse)

    identity = jnp.broadcast_to(jnp.eye(length, dtype=lower.dtype), lower.shape)
    return jax.lax.fori_loop(0, (length - 1).bit_length(), double, identity)


def _unit(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + LENGTH_EPSILON)


class GatedDeltaNet(nn.Module):
    """One Gated DeltaNet layer, the counterpart of `Attention` in recurrent layers.

    The state, float32, has two arrays: "convolution" [B, C, 2 K H + N Hv], the inputs of the convolution (queries,
    keys, values) at the last C = convolution_width - 1 tokens, and "recurrent" [B, N, H, Hv]. Every example of a row
    starts from the state that is passed, at any position. The state that is returned is that after the last token of
    each row that has no parent; padding is no token, and a row of padding keeps its state.

    Attributes:
      config: sizes of the layer.
      chunk: tokens of a chunk of a long row.
    """

    config: DeltaNetConfig
    chunk: int = CHUNK

    @nn.compact
    @jax.named_scope("delta_net")
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
        heads, repeats = config.key_heads, config.value_heads // config.key_heads
        tail, recurrent = (
            jnp.broadcast_to(state.arrays[name].astype(jnp.float32), (batch, *shape))
            for name, shape in config.state_shapes
        )
        ends = config.key_width, 2 * config.key_width
        tails: dict[str, Array] = dict(zip(("query", "key", "value"), jnp.split(tail, ends, axis=-1), strict=True))

        def convolved(name: str, count: int, size: int) -> Float[Array, "B T N H"]:
            own = Linear(count * size, name=name)(x)
            shape = config.convolution_width, count * size
            kernel = self.param(f"{name}_convolution", nn.initializers.normal(0.02), shape)
            y, tails[name] = convolve(own, kernel, tails[name], order)
            return jax.nn.silu(y).reshape(batch, length, count, size)

        def by_group(x: Float[Array, "B T N ..."]) -> Float[Array, "B T K R ..."]:
            return x.reshape(batch, length, heads, repeats, *x.shape[3:])

        queries = _unit(convolved("query", heads, config.key_size)) * config.key_size**-0.5
        keys = _unit(convolved("key", heads, config.key_size))
        values = by_group(convolved("value", config.value_heads, config.value_size))

        rate = self.param("a_log", nn.initializers.zeros, (config.value_heads,)).astype(jnp.float32)
        bias = self.param("dt_bias", nn.initializers.ones, (config.value_heads,)).astype(jnp.float32)
        steps = jax.nn.softplus(Linear(config.value_heads, name="decay")(x).astype(jnp.float32) + bias[None, None])
        decays = by_group(-jnp.exp(rate)[None, None] * steps)
        betas = by_group(jax.nn.sigmoid(Linear(config.value_heads, name="beta")(x).astype(jnp.float32)))

        inputs = DeltaInputs(queries, keys, values, decays, betas)
        initial = recurrent.reshape(batch, heads, repeats, config.key_size, config.value_size)
        outputs, final = by_chunks(delta_rule, inputs, initial, order, self.chunk)

        outputs = outputs.reshape(batch, length, config.value_heads, config.value_size)
        gate = Linear(config.value_width, name="gate")(x).reshape(outputs.shape)
        outputs = GatedNorm(config.norm_epsilon, name="norm")(outputs, gate).astype(x.dtype)
        y = Linear(width, name="output")(outputs.reshape(batch, length, config.value_width))
        after = {
            "convolution": jnp.concatenate([tails["query"], tails["key"], tails["value"]], axis=-1),
            "recurrent": final.reshape(recurrent.shape),
        }
        return y, State(after)
