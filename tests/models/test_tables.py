"""Embeddings and output matrices of int8, against the same numbers as floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.models.linen_model import host_table
from spt_jax.models.quantized import table as tables
from spt_jax.models.quantized.table import Int8Table, TableEncoder, table_shapes
from spt_jax.models.vocabulary import log_sum_exp
from spt_jax.runtime.sharding import MeshConfig, make_mesh, parameter_sharding
from spt_jax.testing import tiny_base
from tests.golden.cases import E2B

V, D = 300, 16


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(table, mesh=None, spec=None, dtype=jnp.float32):
    encoder = TableEncoder(table.shape, jnp.dtype(dtype))
    encoder.fill(table)
    return encoder.placed(NamedSharding(mesh or make_mesh(), spec or PartitionSpec()))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 60 tokens."""
    monkeypatch.setattr(tables, "CHUNK_VALUES", 60 * D)


def test_rows_are_within_half_a_step(small_chunks):
    table = noise(V, D)
    own = quantized(table)
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert own.values.dtype == jnp.int8 and own.shape == (V, D)
    assert (np.abs(host_table(own) - table) <= 0.5001 * step).all()
    np.testing.assert_array_equal(own.dense(), host_table(own))
    np.testing.assert_array_equal(quantized(np.zeros((4, D), np.float32)).dense(), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_by_token(dtype):
    own = quantized(noise(V, D), dtype=dtype)
    ids = jnp.asarray([[0, 7], [299, 7]])
    rows = jax.jit(Int8Table.take)(own, ids)
    assert rows.dtype == own.dtype == dtype
    np.testing.assert_array_equal(rows, host_table(own)[np.asarray(ids)].astype(dtype))


def test_products(small_chunks):
    own, x = quantized(noise(V, D)), noise(2, 3, D, seed=1)
    assert own.chunk_count == 5
    np.testing.assert_allclose(jax.jit(Int8Table.products)(own, x), x @ host_table(own).T, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "count"), [(300, 5), (302, 1), (301, 7), (7 * 41, 7), (60, 1)])
def test_chunks_divide_the_vocabulary(vocabulary, count, small_chunks):
    """302 = 2 x 151: a chunk has no more than its tokens, or there is one chunk."""
    assert quantized(noise(vocabulary, D)).chunk_count == count


@pytest.mark.parametrize(("cap", "biased"), [(None, False), (5.0, True)])
@pytest.mark.parametrize("axes", [{}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_log_sums_and_their_gradients(axes, cap, biased, small_chunks):
    """A state of the second row has a logit far above the others'."""
    mesh = make_mesh(MeshConfig(**axes))
    own = quantized(noise(V, D), mesh, PartitionSpec(("fsdp", "tensor")))
    matrix, states, cotangent = jnp.asarray(host_table(own)), noise(4, 9, D, seed=1), noise(4, 9, seed=2)
    states[1, 3] = 30 * matrix[7]
    bias = 3 * jnp.asarray(noise(V, seed=3)) if biased else None

    @jax.jit
    def both(matrix, states):
        sums, pull = jax.vjp(lambda s: log_sum_exp(s, matrix, cap, bias), states)
        return sums, pull(jnp.asarray(cotangent))[0]

    for ours, theirs in zip(both(own, states), both(matrix, states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_dense_table_is_computed():
    """Of 2**23 values, a chunk is half; the program's largest float array is that chunk."""
    own = jax.eval_shape(lambda: Int8Table(jnp.zeros((2**13, 2**10), jnp.int8), jnp.zeros(2**13), jnp.dtype("float32")))
    states = jax.ShapeDtypeStruct((1, 8, 2**10), jnp.float32)
    for program in (
        jax.make_jaxpr(jax.grad(lambda s, t: log_sum_exp(s, t).sum()))(states, own),
        jax.make_jaxpr(lambda s, t: t.products(s))(states, own),
    ):
        assert max(floats(program.jaxpr)) == 2**22


def floats(jaxpr):
    """Sizes of all float arrays that a program computes, in its loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars if out.aval.dtype == jnp.float32)
        for inner in jax.tree.leaves(list(equation.params.values())):
            program = getattr(inner, "jaxpr", inner)
            if hasattr(program, "eqns"):
                yield from floats(program)


@pytest.mark.parametrize(("family", "paths"), [
    ("llama", ["embedding", "output"]), ("gemma2", ["embedding"]), ("gemma4", ["embedding", "per_layer/embedding"]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bases_have_them(family, paths, kind):
    sizes = E2B if family == "gemma4" else {}
    base = tiny_base(family, quantize=kind, **sizes)
    found = jax.tree.leaves_with_path(base.params, is_leaf=lambda leaf: isinstance(leaf, Int8Table))
    tables = {"/".join(key.key for key in path): leaf for path, leaf in found if isinstance(leaf, Int8Table)}
    assert sorted(tables) == paths
    plain = tiny_base(family, **sizes).params
    for path, leaf in tables.items():
        own = plain
        for key in path.split("/"):
            own = own[key]
        expected = np.asarray(own).T if path == "output" else np.asarray(own)
        assert np.abs(host_table(leaf) - expected).max() <= 0.004 * np.abs(expected).max()
    np.testing.assert_array_equal(
        base.model.embedding_table(), host_table(tables["embedding"]) * np.float32(base.config.embedding_scale or 1)
    )


def test_planned_shapes_are_those_of_the_arrays():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    sharding = parameter_sharding(mesh, ("embedding",), (V, D))
    own = quantized(noise(V, D), mesh, sharding.spec)
    for name, shape in table_shapes((V, D), sharding).items():
        leaf = getattr(own, name)
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
