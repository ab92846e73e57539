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
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.layers import Linear, scaled
from spt_jax.models.mamba_config import CHUNK, MambaConfig
from spt_jax.models.memory import State
from spt_jax.models.recurrence import GatedNorm, TokenOrder, convolve, decay_sums, decayed, exact_einsum


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


class Chunk(NamedTuple):
    """Consecutive tokens of rows, and the earlier states that they continue.

    Attributes:
      inputs: of the tokens.
      mask: True where the key is the query itself or a token before it.
      base: one-hot, which of S states is the one before the chunk, for each token.
      ends: for each of E tokens whose state is returned, the tokens of the chunk up to it; none if it is not in there.
      ends_base: as `base`, for these tokens; for one that is not in the chunk, the state that is returned.
    """

    inputs: SpaceInputs
    mask: Bool[Array, "B T T"]
    base: Bool[Array, "B T S"]
    ends: Bool[Array, "B E T"]
    ends_base: Bool[Array, "B E S"]


@jax.named_scope("state_space")
def state_space(
    inputs: SpaceInputs, initial: Float[Array, "B K R Hv H"], order: TokenOrder, chunk: int = CHUNK
) -> tuple[Float[Array, "B T K R Hv"], Float[Array, "B K R Hv H"]]:
    """Computes a state space (Dao & Gu 2024, equation 16) over tokens that form trees.

    The time and the memory are linear in T, for chunks of a fixed length. Two states are passed from chunk to chunk:
    that after the last token, which may be of a child, and that after the last token without a parent, which later
    children continue.

    Args:
      inputs: queries, keys, values and decays.
      initial: the state before the first token of every tree.
      order: the order of the tokens, as `token_order` describes it.
      chunk: tokens of a chunk.

    Returns:
      The outputs without D x, and the state after the last token of each row that has no parent.
    """
    batch, length = order.roots.shape
    if length <= chunk:
        one, roots = jnp.ones((batch, length, 1), bool), order.until_last[:, None]
        outputs, states = _of_chunk(Chunk(inputs, order.mask, one, roots, one[:, :1]), initial[None])
        return outputs, states[0]

    chunks = _split(inputs, order, chunk)

    def step(states: Float[Array, "2 B K R Hv H"], own: Chunk) -> tuple[Array, Array]:
        outputs, states = _of_chunk(own, jnp.concatenate([states, initial[None]]))
        return states, outputs

    states, outputs = jax.lax.scan(jax.checkpoint(step), jnp.stack([initial, initial]), chunks)
    return jnp.moveaxis(outputs, 0, 1).reshape(batch, -1, *outputs.shape[3:])[:, :length], states[1]


def _of_chunk(
    chunk: Chunk, states: Float[Array, "S B K R Hv H"]
) -> tuple[Float[Array, "B T K R Hv"], Float[Array, "E B K R Hv H"]]:
    """Returns the outputs of the tokens of a chunk, and the states after those whose state is asked for."""
    queries, keys, values, decays = chunk.inputs
    by_head = jnp.moveaxis(decays, 1, -1)
    sums = decay_sums(chunk.mask, by_head)
    products = jnp.einsum("btkh,bskh->bkts", queries, keys)[:, :, None]
    own = jnp.einsum("bkrts,bskrv->btkrv", products * decayed(sums, sums, chunk.mask), values)
    choices = jnp.einsum("btkh,bts->btskh", queries, chunk.base.astype(jnp.float32))
    grown = jnp.moveaxis(jnp.exp(jnp.sum(sums, axis=0)), -1, 1)[..., None]
    outputs = own + grown * jnp.einsum("btskh,sbkrvh->btkrv", choices, states)

    ends = decay_sums(chunk.ends, by_head)
    written = jnp.einsum("bkres,bskh,bskrv->ebkrvh", decayed(ends, sums, chunk.ends), keys, values)
    before = exact_einsum("bes,sbkrvh->ebkrvh", chunk.ends_base.astype(jnp.float32), states)
    grown = jnp.moveaxis(jnp.exp(jnp.sum(ends, axis=0)), -1, 0)[..., None, None]
    return outputs, grown * before + written


def _split(inputs: SpaceInputs, order: TokenOrder, size: int) -> Chunk:
    """Returns the chunks of rows, along a new leading axis.

    Of the states before a chunk, number 0 is that after the last token, 1 that after the last one without a parent,
    and 2 the initial one. Number 0 and 1 are also the states that are returned.
    """
    batch, length = order.roots.shape
    count = -(-length // size)
    missing = count * size - length

    def by_chunk(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def columns(mask: Bool[Array, "L B E T"]) -> Bool[Array, "L B E size"]:
        """Returns those of each chunk itself."""
        padded = jnp.pad(mask, [(0, 0)] * 3 + [(0, missing)]).reshape(*mask.shape[:3], count, size)
        return jnp.take_along_axis(padded, jnp.arange(count)[:, None, None, None, None], axis=3)[:, :, :, 0]

    real = jnp.diagonal(order.mask, axis1=1, axis2=2)
    kinds = by_chunk(jnp.stack([real, order.roots], axis=2))
    places = jnp.arange(count * size).reshape(count, 1, size, 1)
    # The last token of each kind up to the end of each chunk, and up to the end of the one before it; -1 for none.
    last: Int[Array, "L B 2"] = jax.lax.cummax(jnp.max(jnp.where(kinds, places, -1), axis=2), axis=0)
    earlier = jnp.concatenate([jnp.full_like(last[:1], -1), last[:-1]])

    def state_before(mask: Bool[Array, "L B E T"]) -> Bool[Array, "L B E 3"]:
        """Returns which state precedes the chunk for tokens, of which each row of the mask shows those before it."""
        found = jnp.take_along_axis(mask, jnp.maximum(earlier, 0)[:, :, None], axis=3) & (earlier >= 0)[:, :, None]
        latest, root = found[..., 0], found[..., 1]
        return jnp.stack([latest, root & ~latest, ~root & ~latest], axis=3)

    mask = by_chunk(order.mask)
    rows = jnp.take_along_axis(order.mask[None], jnp.maximum(last, 0)[..., None], axis=2)
    present = (last > earlier)[..., None]
    kept = jnp.broadcast_to(jnp.eye(2, 3, dtype=bool)[None, None], (count, batch, 2, 3))
    return Chunk(
        inputs=SpaceInputs(*map(by_chunk, inputs)),
        mask=columns(mask),
        base=state_before(mask),
        ends=columns(rows) & present,
        ends_base=jnp.where(present, state_before(rows), kept),
    )


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
        outputs, final = state_space(inputs, initial, order, self.chunk)

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
