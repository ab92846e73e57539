"""DeBERTa: terms of distances, keys of a prefix, positions that matter only by their differences, and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix
from spt_jax.models.attention import Stream
from spt_jax.models.convolution import shifted
from spt_jax.models.disentangled import distance_terms, distances_of, row_by_distance
from spt_jax.models.disentangled_config import DisentangledConfig
from spt_jax.models.kernels import check_kernel
from spt_jax.prompts import DeepPrompts
from spt_jax.runtime.mesh_config import MeshConfig
from spt_jax.runtime.sharding import make_mesh
from spt_jax.testing import tiny_base

P, T = 3, 12


@pytest.fixture(scope="module")
def base():
    return tiny_base("deberta-v2", num_attention_heads=1, num_hidden_layers=2)


def stream_at(first):
    positions = first + jnp.arange(T)[None]
    return Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))


def layer_norm(x, scale, bias, epsilon=1e-7):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def test_linear_distances_are_clipped():
    config = DisentangledConfig(
        span=3, max_distance=3, logarithmic=False, content_to_position=True, position_to_content=False, shared=True,
        normed=False,
    )  # fmt: skip
    assert row_by_distance(config, 5).tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("terms", ["c2p", "p2c", "both"])
def test_terms_are_products_with_embeddings_of_distances(terms):
    random = np.random.default_rng(0)
    queries, keys = random.standard_normal((2, 2, 4, 2, 3)).astype(np.float32)
    key, query = random.standard_normal((2, 7, 2, 3)).astype(np.float32)
    rows = random.integers(0, 7, (2, 4, 4))
    has = {"c2p": terms != "p2c", "p2c": terms != "c2p"}
    key_of, query_of = (jnp.asarray(x) if has[name] else None for x, name in ((key, "c2p"), (query, "p2c")))
    found = distance_terms(*map(jnp.asarray, (queries, keys, rows)), key=key_of, query=query_of, scale=0.5)
    for b, n, t, s in np.ndindex(2, 2, 4, 4):
        row = rows[b, t, s]
        expected = has["c2p"] * (queries[b, t, n] @ key[row, n]) + has["p2c"] * (keys[b, s, n] @ query[row, n])
        np.testing.assert_allclose(found[b, n, t, s], 0.5 * expected, atol=1e-5)


def test_scores_of_tokens_and_of_a_prefix(base):
    """Scores of a prefix are products of queries and keys; those of tokens have two terms for distances as well."""
    method = DeepPrompts(length=P, classes=2)
    params = jax.tree.map(lambda a: a + 0.3, method.init_params(jax.random.key(0), base))
    prefix = encode_prefix(base.model, method.materialize(params, base.model), jnp.zeros(0, jnp.int32))
    x, stream = base.model.embed(jnp.arange(20, 20 + T)[None]), stream_at(P)
    queries = np.asarray(base.model.queries(x, stream, prefix))[:, 0, :, 0]
    weights = np.asarray(base.model.attention_weights(x, stream, prefix))[:, 0]
    _, memory = base.model.run(x, stream, prefix, return_memory=True)
    own, before = (jax.tree.map(np.asarray, one["self"].keys) for one in (memory, prefix.memory))
    own, before = own[:, 0, :, 0], before[:, :, 0]

    stored = jax.tree.map(np.asarray, base.model.params)
    norm, attention = stored["distance_norm"], stored["layers"]["attention"]
    embeddings = layer_norm(stored["distances"], norm["scale"], norm["bias"])
    rows = row_by_distance(base.config.disentangled, T)[np.arange(T)[:, None] - np.arange(T) + T]
    for layer in range(2):
        key, query = (
            (embeddings @ attention[name]["kernel"][layer] + attention[name]["bias"][layer])[rows]
            for name in ("key", "query")
        )
        content = queries[layer] @ own[layer].T
        to_position = np.einsum("td,tsd->ts", queries[layer], key)
        from_position = np.einsum("sd,tsd->ts", own[layer], query)
        scores = np.concatenate([queries[layer] @ before[layer].T, content + to_position + from_position], axis=1)
        expected = np.asarray(jax.nn.softmax(jnp.asarray(scores / np.sqrt(3 * 32)), axis=1))
        np.testing.assert_allclose(weights[layer], expected, atol=1e-5)
        assert expected[:, :P].min() > 1e-4


def test_only_differences_of_positions_matter(base):
    x = base.model.embed(jnp.arange(20, 20 + T)[None])
    first, later = (np.asarray(base.model.run(x, stream_at(at))[0]) for at in (0, 40))
    np.testing.assert_allclose(first, later, atol=1e-6)
    backwards = np.asarray(base.model.run(x[:, ::-1], stream_at(0))[0])[:, ::-1]
    assert np.abs(first - backwards).max() > 0.1


def test_distances_that_occur_in_a_row(base):
    """Embeddings of larger distances are left out, and those of the others are the same."""
    own, reach = base.config.disentangled, base.config.max_positions
    embeddings = jnp.arange(2.0 * own.span)[:, None]
    positions = jnp.asarray([[3, 4, 5, 6], [0, 1, 0, 1]])
    found = distances_of(own, embeddings, positions)
    apart = np.asarray(positions[:, :, None] - positions[:, None, :])
    expected = row_by_distance(own, reach)[apart + reach]
    np.testing.assert_array_equal(np.asarray(found.embeddings)[np.asarray(found.rows), 0], expected)
    assert found.embeddings.shape == (7, 1)


def test_a_convolution_reads_zeros_beyond_its_example():
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    expected = {-1: [0, 1, 2, 0, 4, 0], 0: [1, 2, 3, 4, 5, 6], 1: [2, 3, 0, 5, 0, 0], 2: [3, 0, 0, 0, 0, 0]}
    for by, values in expected.items():
        assert shifted(x, segments, by)[0, :, 0].tolist() == values


def test_a_mesh_changes_nothing():
    """Weights and rows split over devices, the maps of distances and of the convolution among them."""
    options = {"share_att_key": False, "conv_kernel_size": 3, "num_hidden_layers": 2}
    positions = jnp.tile(jnp.arange(T), (4, 1))
    ids, stream = 20 + positions, Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    found = []
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        model = tiny_base("deberta-v2", mesh=mesh, **options).model
        found.append(np.asarray(model.run(model.embed(ids), stream)[0]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_fused_kernels_are_refused(base):
    with pytest.raises(ConfigError, match="does not support disentangled attention"):
        check_kernel("splash", base.config, jnp.float32, base.mesh)
