"""Virtual tokens whose embeddings depend on the input of each example."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.attention import Stream
from spt_jax.prompts.networks import Linear, linear

# Added to the mean square of a representation, which is 0 for an input without tokens.
EPSILON = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InstanceGate:
    """Two small networks that scale each number of the virtual tokens by a factor that depends on the input.

    LoPA (Jain et al. 2024, arXiv 2405.15282): the virtual tokens of an example are Z * sigmoid(U V^T), where Z [P, D]
    are the rows of the prompt, and U [P, r] and V [D, r] are the outputs of the networks for the example's input.

    Attributes:
      rows: the layers "inner" [D, h] and "outer" [h, P * r], each with a kernel and a bias, float32.
      columns: the layers "inner" [D, h] and "outer" [h, D * r].
    """

    rows: Mapping[str, Linear]
    columns: Mapping[str, Linear]


def instance_factors(gate: InstanceGate, inputs: Float[Array, "N D"], length: int) -> Float[Array, "N {length} D"]:
    """Returns the factors sigmoid(U V^T) for representations of N inputs.

    Args:
      gate: the networks, each of which is two linear layers with tanh between them.
      inputs: the representations.
      length: the number of virtual tokens P.
    """
    left = _network(gate.rows, inputs).reshape(len(inputs), length, -1)
    right = _network(gate.columns, inputs).reshape(*inputs.shape, -1)
    return jax.nn.sigmoid(jnp.einsum("npr,ndr->npd", left, right))


def _network(layers: Mapping[str, Any], x: Float[Array, "N I"]) -> Float[Array, "N O"]:
    return linear(layers["outer"], jnp.tanh(linear(layers["inner"], x)))


def instance_rows(
    gate: InstanceGate,
    tokens: Float[Array, "P D"],
    ids: Int[Array, "B T"],
    real: Float[Array, "B T D"],
    stream: Stream,
    vocab_size: int,
) -> Float[Array, "B T D"]:
    """Returns the embedding of the virtual token at each place of a stream; elsewhere, any of them.

    An input is represented by the mean of the base's embeddings of its real tokens, divided by the root of its mean
    square. The tokens are those of `Stream.inputs`, or all of the example.

    Args:
      gate: the networks.
      tokens: the rows Z of the prompt.
      ids: real and virtual ids; an example with virtual ids has all P of them, the first one first.
      real: the embeddings of the real ids.
      stream: the segments of the ids, and which of them are inputs.
      vocab_size: the number of real ids V.
    """
    length, width = tokens.shape
    batch, count = len(ids), max(1, ids.shape[1] // length)  # no row has more examples with virtual ids than that
    first = ids == vocab_size
    number = jnp.cumsum(first, axis=1)
    opens = first[:, None, :] & (number[:, None, :] == jnp.arange(1, count + 1)[None, :, None])
    segments = jnp.sum(jnp.where(opens, stream.segments[:, None, :], 0), axis=-1)
    read = (ids < vocab_size) & (stream.segments > 0)
    read = read if stream.inputs is None else read & stream.inputs
    members = (stream.segments[:, None, :] == segments[:, :, None]) & read[:, None, :]
    weights = members / jnp.maximum(members.sum(axis=-1, keepdims=True), 1)
    means = jnp.einsum("bnt,btd->bnd", weights, real.astype(jnp.float32))
    scaled = means * jax.lax.rsqrt(jnp.square(means).mean(axis=-1, keepdims=True) + EPSILON)
    factors = instance_factors(gate, scaled.reshape(batch * count, width), length)
    table = (tokens[None] * factors).reshape(batch, count * length, width)
    places = jnp.maximum(number - 1, 0) * length + jnp.where(ids >= vocab_size, ids - vocab_size, 0)
    return jnp.take_along_axis(table, places[:, :, None], axis=1, mode="clip")
