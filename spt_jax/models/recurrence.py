"""What recurrent layers share: the order of the tokens of a row, the causal convolution, and sums of decays.

A row holds several examples, and some branch off the end of another, so that "before" is a relation between tokens and
not their order in the row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Stream, visible

Inputs = TypeVar("Inputs")

# Accelerators would round float32 factors to fewer bits. Sums of decays need them all.
exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Which tokens of a row come before which. Padding comes before nothing, and nothing before it.

    Indices count the C tokens that the state remembers, then the T tokens of the row.

    Attributes:
      mask: True where the key is the query itself or a token before it.
      roots: True for tokens of segments without a parent.
      windows: the indices of each token and of the C tokens right before it; its own is the last.
      tail: the indices of the last token of `roots` and of the C - 1 tokens before it; the C remembered ones if there
        is none.
      until_last: True for the last token of `roots` and those before it.
    """

    mask: Bool[Array, "B T T"]
    roots: Bool[Array, "B T"]
    windows: Int[Array, "B T W"]
    tail: Int[Array, "B C"]
    until_last: Bool[Array, "B T"]


def token_order(stream: Stream, remembered: int) -> TokenOrder:
    """Returns the order of the tokens of each row.

    The tokens before a token are those that attention would see: the earlier ones of its segment, and those of the
    parent of its segment. The order must be a tree, with every token to the right of those before it: a parent has no
    parent, and its children start where it ends and come before the next segment without a parent.

    Args:
      stream: positions and segments of the tokens.
      remembered: number C of tokens that the state remembers, at least 1.
    """
    batch, length = stream.positions.shape
    real = stream.segments > 0
    roots = real & (stream.parents == 0)
    mask = visible(stream, stream.positions, stream.segments) & real[:, :, None]
    places = remembered + jnp.arange(length)[None]
    before = mask & ~jnp.eye(length, dtype=bool)[None]
    # The mask contains no token to the right, so the rightmost one before a token is the nearest.
    nearest = jnp.max(jnp.where(before, places[:, None], remembered - 1), axis=2)
    chain = jnp.broadcast_to(jnp.maximum(jnp.arange(remembered) - 1, 0)[None], (batch, remembered))
    previous = jnp.concatenate([chain, nearest], axis=1)

    def backwards(start: Int[Array, "B N"], count: int) -> Int[Array, "B N count"]:
        """Returns the indices of the tokens at `start` and of those before them, `count` in all, the first one last."""
        found = [start]
        for _ in range(count - 1):
            found.append(jnp.take_along_axis(previous, found[-1], axis=1, mode="promise_in_bounds"))
        return jnp.stack(found[::-1], axis=2)

    last = jnp.max(jnp.where(roots, places, remembered - 1), axis=1)
    return TokenOrder(
        mask=mask,
        roots=roots,
        windows=backwards(jnp.broadcast_to(places, (batch, length)), remembered + 1),
        tail=backwards(last[:, None], remembered)[:, 0],
        until_last=jnp.any(mask & (places == last[:, None])[:, :, None], axis=1),
    )


def convolve(
    x: Float[Array, "B T F"], kernel: Float[Array, "W F"], tail: Float[Array, "B C F"], order: TokenOrder
) -> tuple[Float[Array, "B T F"], Float[Array, "B C F"]]:
    """Computes the causal depthwise convolution of each token and the C = W - 1 tokens before it.

    Args:
      x: inputs of the row's tokens.
      kernel: weights; the last row is that of the token itself.
      tail: inputs of the last tokens before the row, float32.
      order: the order of the tokens.

    Returns:
      The result in float32, and the tail after the last token of the row that has no parent.
    """
    whole = jnp.concatenate([tail, x.astype(jnp.float32)], axis=1)

    def pick(index: Int[Array, "B N"]) -> Float[Array, "B N F"]:
        return jnp.take_along_axis(whole, index[:, :, None], axis=1, mode="promise_in_bounds")

    weights = kernel.astype(jnp.float32)[:, None, None]
    y = x.astype(jnp.float32) * weights[-1]
    for place in range(kernel.shape[0] - 1):
        y = y + pick(order.windows[:, :, place]) * weights[place]
    return y, pick(order.tail)


def decay_sums(mask: Bool[Array, "B T S"], decays: Float[Array, "B K R S"]) -> Float[Array, "2 B K R T"]:
    """Returns the sums of the decays of the tokens of each row of a mask, as a multiple of 1/64 and a small rest.

    Sums of multiples of 1/64 are exact. Differences of sums are so as precise in a long row as in a short one.
    """
    coarse = jax.lax.stop_gradient(jnp.round(decays * 64) / 64)
    return exact_einsum("bts,pbkrs->pbkrt", mask.astype(jnp.float32), jnp.stack([coarse, decays - coarse]))


def decayed(
    at: Float[Array, "2 B K R T"], before: Float[Array, "2 B K R S"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B K R T S"]:
    """Returns exp(G_i - G_j) of the sums G where the mask is True, else 0. Outside of it, differences may overflow."""
    shown = mask[:, None, None]
    coarse, rest = at[..., :, None] - before[..., None, :]
    return jnp.where(shown, jnp.exp(jnp.where(shown, coarse + rest, 0.0)), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk(Generic[Inputs]):
    """Consecutive tokens of rows, and which of several states precede them.

    Attributes:
      inputs: arrays [B, T, ...] of the tokens.
      mask: True where the key is the query itself or a token before it.
      base: one-hot, which of S states is the one before the chunk, for each token.
      ends: for each of E tokens whose state is returned, the tokens of the chunk up to it; none if it is not in there.
      ends_base: as `base`, for these tokens; for one that is not in the chunk, the state that is returned.
    """

    inputs: Inputs
    mask: Bool[Array, "B T T"]
    base: Bool[Array, "B T S"]
    ends: Bool[Array, "B E T"]
    ends_base: Bool[Array, "B E S"]


class ChunkResult(NamedTuple):
    """What a recurrence computes of a chunk.

    Attributes:
      outputs: of its tokens.
      states: the states after the tokens of `Chunk.ends`.
    """

    outputs: Float[Array, "B T ..."]
    states: Float[Array, "E B ..."]


def by_chunks(
    of_chunk: Callable[[Chunk[Inputs], Float[Array, "S B ..."]], ChunkResult],
    inputs: Inputs,
    initial: Float[Array, "B ..."],
    order: TokenOrder,
    size: int,
) -> tuple[Float[Array, "B T ..."], Float[Array, "B ..."]]:
    """Computes a recurrence over tokens that form trees, in a time and a memory that are linear in T.

    Two states are passed from chunk to chunk: that after the last token, which may be of a child, and that after the
    last token without a parent, which later children continue.

    Args:
      of_chunk: computes a chunk from its S earlier states.
      inputs: arrays [B, T, ...].
      initial: the state before the first token of every tree.
      order: the order of the tokens, as `token_order` describes it.
      size: tokens of a chunk.

    Returns:
      The outputs, and the state after the last token of each row that has no parent.
    """
    batch, length = order.roots.shape
    if length <= size:
        one = jnp.ones((batch, length, 1), bool)
        outputs, states = of_chunk(Chunk(inputs, order.mask, one, order.until_last[:, None], one[:, :1]), initial[None])
        return outputs, states[0]

    def step(states: Float[Array, "2 B ..."], chunk: Chunk[Inputs]) -> tuple[Array, Array]:
        outputs, states = of_chunk(chunk, jnp.concatenate([states, initial[None]]))
        return states, outputs

    states, outputs = jax.lax.scan(jax.checkpoint(step), jnp.stack([initial, initial]), _split(inputs, order, size))
    return jnp.moveaxis(outputs, 0, 1).reshape(batch, -1, *outputs.shape[3:])[:, :length], states[1]


def _split(inputs: Inputs, order: TokenOrder, size: int) -> Chunk[Inputs]:
    """Returns the chunks of rows, along a new leading axis.

    Of the states before a chunk, number 0 is that after the last token, 1 that after the last one without a parent,
    and 2 the initial one. Number 0 and 1 are also the states that are returned.
    """
    batch, length = order.roots.shape
    count = -(-length // size)
    missing = count * size - length

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def columns(mask: Bool[Array, "L B E T"]) -> Bool[Array, "L B E size"]:
        """Returns those of each chunk itself."""
        padded = jnp.pad(mask, [(0, 0)] * 3 + [(0, missing)]).reshape(*mask.shape[:3], count, size)
        return jnp.take_along_axis(padded, jnp.arange(count)[:, None, None, None, None], axis=3)[:, :, :, 0]

    kinds = split(jnp.stack([jnp.diagonal(order.mask, axis1=1, axis2=2), order.roots], axis=2))
    places = jnp.arange(count * size).reshape(count, 1, size, 1)
    # The last token of each kind up to the end of each chunk, and up to the end of the one before it; -1 for none.
    last: Int[Array, "L B 2"] = jax.lax.cummax(jnp.max(jnp.where(kinds, places, -1), axis=2), axis=0)
    earlier = jnp.concatenate([jnp.full_like(last[:1], -1), last[:-1]])

    def state_before(mask: Bool[Array, "L B E T"]) -> Bool[Array, "L B E 3"]:
        """Returns which state precedes the chunk for tokens, of which each row of the mask shows those before it."""
        found = jnp.take_along_axis(mask, jnp.maximum(earlier, 0)[:, :, None], axis=3) & (earlier >= 0)[:, :, None]
        latest, root = found[..., 0], found[..., 1]
        return jnp.stack([latest, root & ~latest, ~root & ~latest], axis=3)

    mask = split(order.mask)
    rows = jnp.take_along_axis(order.mask[None], jnp.maximum(last, 0)[..., None], axis=2)
    present = (last > earlier)[..., None]
    kept = jnp.broadcast_to(jnp.eye(2, 3, dtype=bool)[None, None], (count, batch, 2, 3))
    return Chunk(
        inputs=jax.tree.map(split, inputs),
        mask=columns(mask),
        base=state_before(mask),
        ends=columns(rows) & present,
        ends_base=jnp.where(present, state_before(rows), kept),
    )


def end_states(
    chunk: Chunk[Inputs],
    decays: Float[Array, "B K R T"],
    sums: Float[Array, "2 B K R T"],
    states: Float[Array, "S B K R ..."],
    written: Callable[[Float[Array, "B K R E T"]], Float[Array, "E B K R ..."]],
) -> Float[Array, "E B K R ..."]:
    """Returns the states after the tokens of `Chunk.ends`.

    Args:
      chunk: the chunk.
      decays: logarithms of the decays of its tokens.
      sums: their sums, of each token.
      states: the earlier states.
      written: returns what the tokens of the chunk write to states, for the decays of each token until the end.
    """
    ends = decay_sums(chunk.ends, decays)
    before = exact_einsum("bes,sbkrxy->ebkrxy", chunk.ends_base.astype(jnp.float32), states)
    grown = jnp.moveaxis(jnp.exp(jnp.sum(ends, axis=0)), -1, 0)[..., None, None]
    return grown * before + written(decayed(ends, sums, chunk.ends))


class GatedNorm(nn.Module):
    """RMSNorm of the last axis, and a factor SiLU(gate), in float32.

    Attributes:
      epsilon: of the norm.
      scale_axes: how many of the last axes the scale has; it is stored flat.
      gate_first: whether the product is normalized, instead of x.
    """

    epsilon: float
    scale_axes: int = 1
    gate_first: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T N H"], gate: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        shape = x.shape[-self.scale_axes :]
        scale = self.param("scale", nn.initializers.ones, (math.prod(shape),)).astype(jnp.float32)
        factor = jax.nn.silu(gate.astype(jnp.float32))
        x = x * factor if self.gate_first else x
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * scale.reshape((1,) * (x.ndim - len(shape)) + shape)
        return x if self.gate_first else x * factor
