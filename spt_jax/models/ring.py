"""Attention of rows whose tokens are split over devices (ring attention, Liu et al. 2023, arXiv 2310.01889).

Queries stay; keys and values go round the devices of the "sequence" axis, so that none ever holds a whole row. The
backward pass goes round once more, and computes the weights again from each query's normaliser.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import (
    Scoring,
    Source,
    Stream,
    grouped_heads,
    mix,
    scores_of,
    soft_cap_slope,
    ungrouped_heads,
    visible,
    within_window,
)
from spt_jax.runtime.sharding import ROWS, row_shards

AXIS = "sequence"


def splits(mesh: Mesh | None, stream: Stream) -> bool:
    """Whether rows lie on the mesh so that they go round: more than one device along them, and even shares."""
    rows, length = stream.positions.shape
    return mesh is not None and mesh.shape[AXIS] > 1 and length % mesh.shape[AXIS] == 0 and rows % row_shards(mesh) == 0


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is static: the mesh, scoring, the window (0 for none), and whether each row has a prefix of its own."""

    mesh: Mesh
    scoring: Scoring
    window: int
    own_prefixes: bool

    def map(self, function: Any, inputs: Any, outputs: Any) -> Any:
        return jax.shard_map(
            functools.partial(function, self), mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    @property
    def tokens(self) -> P:
        return P(ROWS, AXIS)

    @property
    def heads(self) -> P:
        return P(ROWS, AXIS, "tensor")

    @property
    def normalisers(self) -> P:
        """[B, K, G T, 1]: a device's groups of its own tokens stand together."""
        return P(ROWS, "tensor", AXIS)

    @property
    def arrays(self) -> tuple[P, P, P, P]:
        prefix = P(ROWS, None, "tensor") if self.own_prefixes else P(None, "tensor")
        return self.heads, self.heads, self.heads, prefix

    @property
    def places(self) -> tuple[P, P, P]:
        return self.tokens, P(ROWS) if self.own_prefixes else P(), P()

    def next(self, tree: Any) -> Any:
        """What the device before this one holds."""
        count = self.mesh.shape[AXIS]
        return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % count) for i in range(count)])


def ring_attend(
    mesh: Mesh,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    stream: Stream,
    prefix: tuple[Array, Array] | None = None,
    prefix_positions: Array | None = None,
    *,
    window: int = 0,
    windowed: Bool[Array, ""] | None = None,
    scoring: Scoring | None = None,
) -> Float[Array, "B T N H"]:
    """`attention.attend` over a prefix and the rows themselves, with T split over the mesh's "sequence" axis.

    Args:
      mesh: `splits` must hold for it.
      queries, keys, values: of the rows.
      stream: where their tokens stand.
      prefix: keys and values [P, K, H] that all rows see, or [B, P, K, H] of each row's own.
      prefix_positions: where those stand, [P] or [B, P].
      window: width of the sliding window, 0 for none.
      windowed: whether it holds in this layer; None for always.
      scoring: as for `attend`.
    """
    scoring = scoring or Scoring(queries.shape[-1] ** -0.5)
    ring = _Ring(mesh, scoring, window, prefix is not None and prefix[0].ndim == 4)
    tokens = (stream.positions, stream.segments, stream.parents)
    windowed = jnp.asarray(window > 0) if windowed is None else windowed
    return _ring_attend(ring, (queries, keys, values, prefix), (tokens, prefix_positions, windowed))


def take_tokens(mesh: Mesh, x: Float[Array, "B T D"], places: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """`jnp.take_along_axis(x, places[:, :, None], axis=1)` for T split over the mesh, which must hold for `splits`."""

    def of_device(x: Array, places: Array) -> Array:
        here = places - jax.lax.axis_index(AXIS) * x.shape[1]
        inside = (here >= 0) & (here < x.shape[1])
        rows = jnp.take_along_axis(x, jnp.where(inside, here, 0)[:, :, None], axis=1)
        return jax.lax.psum(jnp.where(inside[:, :, None], rows, 0), AXIS)

    return jax.shard_map(of_device, mesh=mesh, in_specs=(P(ROWS, AXIS), P(ROWS)), out_specs=P(ROWS))(x, places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(ring: _Ring, arrays: Any, places: Any) -> Array:
    return _forward(ring, arrays, places)[0]


def _forward(ring: _Ring, arrays: Any, places: Any) -> tuple[Array, Any]:
    outputs = (ring.heads, ring.normalisers, ring.normalisers)
    out, highest, total = ring.map(_device_forward, (ring.arrays, ring.places), outputs)(arrays, places)
    return out, (arrays, places, out, highest, total)


def _backward(ring: _Ring, saved: Any, cotangent: Array) -> tuple[Any, None]:
    arrays, places, *rest = saved
    inputs = (ring.arrays, ring.places, ring.heads, ring.normalisers, ring.normalisers, ring.heads)
    return ring.map(_device_backward, inputs, ring.arrays)(arrays, places, *rest, cotangent), None


_ring_attend.defvjp(_forward, _backward)


def _sources(ring: _Ring, prefix: Any, places: Any) -> tuple[Source | None, Any]:
    """The prefix as a source, if there is one, and a function that makes one of travelling keys and values."""
    (positions, segments, parents), prefix_positions, windowed = places
    stream = Stream(positions, segments, parents)

    def source(pair: Any, key_positions: Array, key_segments: Array | None) -> Source:
        mask = visible(stream, key_positions, key_segments)
        if ring.window:
            mask &= ~windowed | within_window(stream, key_positions, ring.window)
        keys, values = pair
        return Source(keys, values, mask)

    if prefix is None:
        return None, source
    rows = positions.shape[0]
    return source(prefix, jnp.broadcast_to(prefix_positions, (rows, prefix_positions.shape[-1])), None), source


def _device_forward(ring: _Ring, arrays: Any, places: Any) -> tuple[Array, Array, Array]:
    """Output, highest score and sum of weights of this device's queries.

    Keys and values go once all the way round, so that one loop body does for all.
    """
    queries, keys, values, prefix = arrays
    positions, segments, _ = places[0]
    grouped = grouped_heads(queries, keys.shape[2])
    prefix_source, source = _sources(ring, prefix, places)

    def take_in(state: Any, source: Source) -> Any:
        highest, total, mixed = state
        scores = scores_of(grouped, source, ring.scoring)
        higher = jnp.maximum(highest, scores.max(-1, keepdims=True))
        weights, keep = jnp.exp(scores - higher), jnp.exp(highest - higher)
        mixed = keep * mixed + mix(weights.astype(queries.dtype), source)
        return higher, keep * total + weights.sum(-1, keepdims=True), mixed

    def step(carry: Any, _: None) -> tuple[Any, None]:
        state, travelling = carry
        return (take_in(state, source(*travelling)), ring.next(travelling)), None

    nothing = jnp.zeros((*grouped.shape[:3], 1), jnp.float32)
    state = (nothing - jnp.inf, nothing, jnp.zeros(grouped.shape, jnp.float32))
    if prefix_source is not None:
        state = take_in(state, prefix_source)
    carry = (state, ((keys, values), positions, segments))
    ((highest, total, mixed), _), _ = jax.lax.scan(step, carry, length=ring.mesh.shape[AXIS])
    return ungrouped_heads((mixed / total).astype(queries.dtype), queries.shape), highest, total


def _device_backward(
    ring: _Ring, arrays: Any, places: Any, out: Array, highest: Array, total: Array, cotangent: Array
) -> tuple[Array, Array, Array, Any]:
    """Cotangents of this device's queries, keys and values, and of the whole prefix."""
    queries, keys, values, prefix = arrays
    positions, segments, _ = places[0]
    kv_heads, dtype = keys.shape[2], queries.dtype
    grouped, slope = grouped_heads(queries, kv_heads), grouped_heads(cotangent, kv_heads)
    product = (slope.astype(jnp.float32) * grouped_heads(out, kv_heads)).sum(-1, keepdims=True)
    prefix_source, source = _sources(ring, prefix, places)

    def of_source(source: Source) -> tuple[Array, tuple[Array, Array]]:
        """What the queries, and these keys and values, get from meeting each other; float32."""
        scores = scores_of(grouped, source, ring.scoring)
        weights = jnp.exp(scores - highest) / total
        rows = "b" if source.keys.ndim == 4 else ""
        by_key = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        of_values = by_key(f"bkqs,bkqh->{rows}skh", weights.astype(dtype), slope)
        of_weights = by_key(f"bkqh,{rows}skh->bkqs", slope, source.values)
        slopes = ring.scoring.scale * soft_cap_slope(scores, ring.scoring.cap)
        of_scores = (weights * (of_weights - product) * slopes).astype(dtype)
        of_keys = by_key(f"bkqs,bkqh->{rows}skh", of_scores, grouped)
        return mix(of_scores, dataclasses.replace(source, values=source.keys)), (of_keys, of_values)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        of_queries, travelling, gathered = carry
        more, slopes = of_source(source(*travelling))
        gathered = jax.tree.map(jnp.add, gathered, slopes)
        return (of_queries + more, *ring.next((travelling, gathered))), None

    of_prefix, of_queries = None, jnp.zeros(grouped.shape, jnp.float32)
    if prefix_source is not None:
        of_queries, slopes = of_source(prefix_source)
        axes = (AXIS,) if ring.own_prefixes else (AXIS, *ROWS)
        of_prefix = jax.tree.map(lambda a, like: jax.lax.psum(a, axes).astype(like.dtype), slopes, prefix)
    nothing = jnp.zeros(keys.shape, jnp.float32)
    carry = (of_queries, ((keys, values), positions, segments), (nothing, nothing))
    (of_queries, _, gathered), _ = jax.lax.scan(step, carry, length=ring.mesh.shape[AXIS])
    of_keys, of_values = (a.astype(dtype) for a in gathered)
    return ungrouped_heads(of_queries.astype(dtype), queries.shape), of_keys, of_values, of_prefix
