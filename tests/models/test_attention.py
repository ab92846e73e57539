"""Who sees whom, and one softmax over several sources."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.models.attention import Source, Stream, attend, visible, within_window
from spt_jax.models.config import DecoderConfig
from spt_jax.models.self_attention import Attention


def test_visible_by_definition():
    """Every pair of a row with two examples, a child of each, and padding, against the sentence that defines it."""
    positions = np.asarray([[0, 1, 2, 0, 1, 3, 4, 2, 0, 0]])
    segments = np.asarray([[1, 1, 1, 2, 2, 3, 3, 4, 0, 0]])
    parents = np.asarray([[0, 0, 0, 0, 0, 1, 1, 2, 0, 0]])
    rows = Stream(*(jnp.asarray(x) for x in (positions, segments, parents)))
    seen = np.asarray(visible(rows, rows.positions, rows.segments))[0]
    for query, key in itertools.product(range(8), range(10)):
        own = segments[0, key] == segments[0, query]
        parent = parents[0, query] == segments[0, key] and segments[0, key] != 0
        assert seen[query, key] == ((own or parent) and positions[0, key] <= positions[0, query]), (query, key)
    prefix = np.asarray(visible(rows, jnp.asarray([[0, 1, 2]]), None))[0]
    np.testing.assert_array_equal(prefix, positions[0][:, None] >= np.arange(3))


def test_window_holds_the_last_positions_including_its_own():
    rows = Stream(*(jnp.asarray(x) for x in ([[9]], [[1]], [[0]])))
    seen = within_window(rows, jnp.asarray([[5, 6, 7, 8, 9]]), 3)
    np.testing.assert_array_equal(seen[0, 0], [False, False, True, True, True])


def naive(queries, keys, values, mask):
    """Loops over rows and heads in float64."""
    out = np.zeros(queries.shape)
    groups = queries.shape[2] // keys.shape[2]
    for b, n, t in itertools.product(range(queries.shape[0]), range(queries.shape[2]), range(queries.shape[1])):
        scores = keys[b, :, n // groups] @ queries[b, t, n] / np.sqrt(queries.shape[-1])
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0)
        out[b, t, n] = weights / weights.sum() @ values[b, :, n // groups]
    return out


def sources_of(generator, batch=2, length=3, shared=5, own=4, kv_heads=2, size=6):
    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    queries = draw(batch, length, 2 * kv_heads, size)
    first = draw(shared, kv_heads, size), draw(shared, kv_heads, size)
    second = draw(batch, own, kv_heads, size), draw(batch, own, kv_heads, size)
    masks = [generator.random((batch, length, s)) < 0.7 for s in (shared, own)]
    masks[0][..., 0] = True
    return queries, first, second, masks


def concatenated(first, second, batch):
    return [np.concatenate([np.broadcast_to(a, (batch, *a.shape)), b], 1) for a, b in zip(first, second, strict=True)]


def test_two_sources_are_one_softmax():
    queries, first, second, masks = sources_of(np.random.default_rng(0))
    sources = [Source(*map(jnp.asarray, (*kv, m))) for kv, m in zip((first, second), masks, strict=True)]
    expected = naive(queries, *concatenated(first, second, 2), np.concatenate(masks, -1))
    np.testing.assert_allclose(attend(jnp.asarray(queries), sources), expected, atol=1e-6)


def test_gradients_over_two_sources_equal_those_over_one():
    """The maximum and the normaliser of both sources take part in every gradient; a stopped one would show here."""
    queries, first, second, masks = sources_of(np.random.default_rng(1))
    weights = np.random.default_rng(2).standard_normal(queries.shape).astype(np.float32)

    def split(queries, first, second):
        sources = [Source(*first, jnp.asarray(masks[0])), Source(*second, jnp.asarray(masks[1]))]
        return (attend(queries, sources) * weights).sum()

    def joined(queries, first, second):
        batch = queries.shape[0]
        pairs = zip(first, second, strict=True)
        keys, values = (jnp.concatenate([jnp.broadcast_to(a[None], (batch, *a.shape)), b], 1) for a, b in pairs)
        repeated = [jnp.repeat(x, 2, axis=2) for x in (keys, values)]
        scores = jnp.einsum("btnh,bsnh->bnts", queries, repeated[0]) / np.sqrt(queries.shape[-1])
        scores = jnp.where(np.concatenate(masks, -1)[:, None], scores, -jnp.inf)
        return (jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), repeated[1]) * weights).sum()

    arguments = jax.tree.map(jnp.asarray, (queries, first, second))
    ours, expected = (jax.grad(f, argnums=(0, 1, 2))(*arguments) for f in (split, joined))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, expected)


def test_jax_stops_the_gradient_of_the_log_sum_exp():
    """Why sources are not merged by log-sum-exp: the forward pass would be right, and the gradient wrong."""
    queries, first, second, _ = sources_of(np.random.default_rng(1))
    weights = np.random.default_rng(2).standard_normal(queries.shape).astype(np.float32)
    shared = [np.broadcast_to(a, (2, *a.shape)) for a in first]

    def joined(queries):
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(shared, second, strict=True))
        return (jax.nn.dot_product_attention(queries, keys, values) * weights).sum()

    def merged(queries):
        parts = [jax.nn.dot_product_attention(queries, *kv, return_residual=True) for kv in (shared, second)]
        shares = jax.nn.softmax(jnp.stack([log_sum for _, log_sum in parts]), axis=0)
        return sum((share[..., None] * out * weights).sum() for share, (out, _) in zip(shares, parts, strict=True))

    (right, slope), (ours, wrong) = (jax.jit(jax.value_and_grad(f))(queries) for f in (joined, merged))
    np.testing.assert_allclose(ours, right, rtol=1e-4)
    assert np.linalg.norm(wrong - slope) > 0.1 * np.linalg.norm(slope)


def test_a_query_that_sees_nothing_is_finite_forward_and_backward():
    queries, first, second, masks = sources_of(np.random.default_rng(3))
    nothing = [np.zeros_like(m) for m in masks]

    def total(queries):
        sources = [Source(*map(jnp.asarray, (*kv, m))) for kv, m in zip((first, second), nothing, strict=True)]
        return attend(queries, sources).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(queries))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_whole_keys_are_normalized_and_then_clipped():
    """As in OLMoE; values are only clipped."""
    config = DecoderConfig(
        family="test", vocab_size=9, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=8,
        max_positions=9, qk_norm="whole", clip_qkv=0.5,
    )  # fmt: skip
    draw = np.random.default_rng(0).normal
    key, value, scale = draw(size=(8, 8)), draw(size=(8, 8)), draw(size=8)
    x = draw(size=(1, 5, 8))
    params = {"key": {"kernel": key}, "value": {"kernel": value}, "key_norm": {"scale": scale}}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    found = Attention(config, None, "xla").apply({"params": params}, jnp.asarray(x, jnp.float32), method="remembered")
    keys, values = x @ key, x @ value
    keys = keys / np.sqrt(np.mean(keys**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale
    np.testing.assert_allclose(found.keys.reshape(1, 5, 8), np.clip(keys, -0.5, 0.5), atol=1e-5)
    np.testing.assert_allclose(found.values.reshape(1, 5, 8), np.clip(values, -0.5, 0.5), atol=1e-5)
