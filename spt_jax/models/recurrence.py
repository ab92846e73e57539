"""What recurrent layers share: the order of the tokens of a row, the causal convolution, and sums of decays.

A row holds several examples, and some branch off the end of another, so that "before" is a relation between tokens and
not their order in the row.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Stream, visible

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
    parent, and its children start where it ends. In rows longer than a chunk, state space layers also need the
    children of a segment to come before the next segment without a parent.

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
