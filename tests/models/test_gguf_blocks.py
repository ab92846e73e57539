"""Blocks of GGUF files on the device, against the reference of the gguf package."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.models.quantized.gguf_blocks import BLOCK_TYPES, GgufKernel, GgufTable, packed_units, unpacked
from spt_jax.models.vocabulary import log_sum_exp
from spt_jax.runtime.sharding import MeshConfig, make_mesh

ROWS, COLUMNS = 512, 6
KINDS = sorted(BLOCK_TYPES)


def blocks_of(kind, columns=COLUMNS, seed=0):
    """Random bytes with scales that are neither tiny nor infinite, [F, bytes], and their values, [F, D]."""
    random, block = np.random.default_rng(seed), BLOCK_TYPES[kind]
    stored = random.integers(0, 256, (columns, ROWS // block.values, block.size)).astype(np.uint8)
    halves = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}.get(kind, [0])
    for start in halves:
        numbers = random.uniform(-0.1, 0.1, stored.shape[:2]).astype(np.float16)
        stored[..., start : start + 2] = numbers[..., None].view(np.uint8)
    stored = stored.reshape(columns, -1)
    return stored, gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])


def kernel_of(*kinds):
    """Layers of these types, and their values."""
    names = tuple(sorted(set(kinds)))
    layers = [blocks_of(kind, seed=i) for i, kind in enumerate(kinds)]
    size = max(stored.shape[1] for stored, _ in layers)
    packed = [packed_units(stored, ROWS // 256, size // (ROWS // 256)) for stored, _ in layers]
    kernel = GgufKernel(
        jnp.asarray(np.stack(packed)), jnp.asarray([names.index(kind) for kind in kinds]), kinds=names, rows=ROWS
    )
    return kernel, np.stack([values.T for _, values in layers])


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_reference(kind):
    """The sizes too; the compiler may join the product and the sum of one value, which rounds once."""
    stored, values = blocks_of(kind)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (BLOCK_TYPES[kind].values, BLOCK_TYPES[kind].size) == block
    np.testing.assert_array_equal(unpacked(kind, jnp.asarray(stored.T[None]), ROWS), values.T)
    compiled = jax.jit(lambda blocks: unpacked(kind, blocks, ROWS))(jnp.asarray(stored.T[None]))
    np.testing.assert_allclose(compiled, values.T, rtol=1e-6, atol=1e-6 * np.abs(values).max())


def test_layers_of_different_types():
    kernel, values = kernel_of("Q4_K", "Q6_K", "Q4_K", "Q8_0")
    np.testing.assert_array_equal(kernel.dense(), values)
    x = np.random.default_rng(1).standard_normal((3, ROWS)).astype(np.float32)

    def through(x, layer):
        return x + layer.matmul(x).sum(), None

    found, pull = jax.vjp(lambda x: jax.jit(jax.lax.scan, static_argnums=0)(through, x, kernel)[0], jnp.asarray(x))
    expected, plain = jax.vjp(lambda x: jax.lax.scan(lambda x, w: (x + (x @ w).sum(), None), x, values)[0], x)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(pull(x)[0], plain(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_tables(kind):
    stored, values = blocks_of(kind, columns=40)
    placed = jax.device_put(stored, NamedSharding(make_mesh(MeshConfig(tensor=2)), PartitionSpec("tensor")))
    table = GgufTable(placed, kind=kind, width=ROWS, dtype=jnp.dtype("float32"))
    assert table.shape == values.shape
    ids = jnp.asarray([[3, 39], [0, 3]])
    np.testing.assert_array_equal(table.take(ids), values[np.asarray(ids)])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 5, ROWS)).astype(np.float32))
    np.testing.assert_allclose(table.products(x), x @ values.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(log_sum_exp(x, table), jax.nn.logsumexp(x @ values.T, axis=-1), rtol=1e-5)
