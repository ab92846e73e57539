"""Rows that are split over devices attend as whole ones do, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spt_jax.models.attention import Scoring, Source, Stream, attend, visible, within_window
from spt_jax.models.memory import KeysValues
from spt_jax.models.ring import ring_attend, splits
from spt_jax.runtime.sharding import MeshConfig, make_mesh

B, T, N, K, H = 2, 24, 4, 2, 6
PREFIX = 5


def stream() -> Stream:
    """A row of one long example behind the prefix, and a row with two, the child of one, and padding."""
    positions, segments, parents = np.zeros((3, B, T), np.int32)
    positions[0], segments[0] = PREFIX + np.arange(T), 1
    for start, stop, first, segment, parent in ((0, 9, 0, 1, 0), (9, 16, 0, 2, 0), (16, 20, 9, 3, 1)):
        positions[1, start:stop] = PREFIX + first + np.arange(stop - start)
        segments[1, start:stop], parents[1, start:stop] = segment, parent
    return Stream(jnp.asarray(positions), jnp.asarray(segments), jnp.asarray(parents))


def arrays(own: bool):
    """Queries, keys, values, prefix, and a cotangent that is 0 for padding, as losses have it."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    draw = [jax.random.normal(key, shape) for key, shape in zip(keys[:3], shapes, strict=True)]
    shape = (B, PREFIX, K, H) if own else (PREFIX, K, H)
    prefix = jax.random.normal(keys[3], shape), jax.random.normal(keys[4], shape)
    real = stream().segments > 0
    return (*draw, prefix), jax.random.normal(keys[5], (B, T, N, H)) * real[..., None, None]


def plain(places, window, scoring, queries, keys, values, prefix):
    rows = stream()
    sources = [] if prefix is None else [((*prefix,), jnp.broadcast_to(places, (B, PREFIX)), None)]
    sources.append(((keys, values), rows.positions, rows.segments))
    made = []
    for pair, positions, segments in sources:
        mask = visible(rows, positions, segments)
        made.append(Source(*pair, mask & within_window(rows, positions, window) if window else mask))
    return attend(queries, made, scoring)


CASES = {
    "no prefix": {"prefix": False},
    "prefix": {},
    "a prefix for each row": {"own": True},
    "a window": {"window": 7},
    "capped scores": {"scoring": Scoring(0.5, 0.8), "window": 7},
    "a window in other layers": {"window": 7, "windowed": False},
}
MESHES = [{"sequence": 2}, {"sequence": 8}, {"data": 2, "sequence": 4}, {"fsdp": 2, "tensor": 2, "sequence": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_in_one_place(case, axes):
    options = {"prefix": True, "own": False, "window": 0, "windowed": None, "scoring": None} | CASES[case]
    mesh, rows = make_mesh(MeshConfig(**axes)), stream()
    inputs, cotangent = arrays(options["own"])
    inputs = inputs if options["prefix"] else (*inputs[:3], None)
    places = jnp.arange(PREFIX, dtype=jnp.int32)
    places = jnp.broadcast_to(places, (B, PREFIX)) if options["own"] else places
    windowed = None if options["windowed"] is None else jnp.asarray(options["windowed"])

    def ring(queries, keys, values, prefix):
        where = None if prefix is None else places
        how = {"window": options["window"], "windowed": windowed, "scoring": options["scoring"]}
        prefix = None if prefix is None else KeysValues(*prefix)
        return ring_attend(mesh, queries, KeysValues(keys, values), rows, prefix, where, **how)

    def both(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    assert splits(mesh, rows)
    real = (rows.segments > 0)[..., None, None]
    window = options["window"] if options["windowed"] is not False else 0
    expected, slopes = both(functools.partial(plain, places, window, options["scoring"]), *inputs)
    ours, our_slopes = jax.jit(functools.partial(both, ring))(*inputs)
    np.testing.assert_allclose(ours * real, expected * real, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), our_slopes, slopes)


def test_what_a_device_holds_falls_with_the_axis():
    """Temporaries of the gradient for a row of 2,048 tokens: the plain weights alone are 2,048 squared."""

    def temporaries(devices: int) -> int:
        mesh = make_mesh(MeshConfig(sequence=devices))
        split = jax.NamedSharding(mesh, P(None, "sequence"))
        long = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=split)
        heads = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32, sharding=split)

        def loss(queries, keys, values, rows):
            if devices == 1:
                return attend(queries, [Source(keys, values, visible(rows, rows.positions, rows.segments))]).sum()
            return ring_attend(mesh, queries, KeysValues(keys, values), rows).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads, Stream(long, long, long))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole, *parts = (temporaries(devices) for devices in (1, 2, 4, 8))
    assert parts[0] < 0.6 * whole
    assert parts[1] < 0.6 * parts[0] and parts[2] < 0.6 * parts[1]
