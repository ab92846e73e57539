"""KL divergences over a whole vocabulary, taken in chunks, against all logits at once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models import vocabulary
from spt_jax.models.divergence import divergences
from spt_jax.testing import tiny_base
from tests.models.test_vocabulary import sizes

B, M = 2, 19


def states(base, seed: int):
    return jax.random.normal(jax.random.key(seed), (B, M, base.layout.width)).astype(base.dtype)


def dense(model, student, teacher, temperature):
    log_q, log_p = (jax.nn.log_softmax(model.logits(own) / temperature) for own in (student, teacher))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


# Plain logits, a soft cap, a scale and a bias.
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gptj"])
@pytest.mark.parametrize("rows", [7, 1000])
def test_values_and_gradients_are_those_of_all_logits(family, rows, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_ROWS", rows)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 1)
    base, temperature = tiny_base(family), 1.7
    own, teacher, cotangent = states(base, 0), states(base, 1), jax.random.normal(jax.random.key(2), (B, M))
    ours, pull = jax.vjp(lambda x: divergences(base.model, x, teacher, temperature), own)
    theirs, dense_pull = jax.vjp(lambda x: dense(base.model, x, teacher, temperature), own)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = dense_pull(cotangent)[0]
    np.testing.assert_allclose(pull(cotangent)[0], expected, atol=1e-5 * np.abs(expected).max())
    same, _ = jax.vjp(lambda x: divergences(base.model, x, own, temperature), own)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    base = tiny_base()
    own, teacher, direction = (np.asarray(states(base, seed)[:1, :1]) for seed in range(3))
    loss = jax.jit(lambda x: divergences(base.model, x, teacher, 1.0).sum())
    slope = (loss(own + 1e-2 * direction) - loss(own - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose((jax.grad(loss)(own) * direction).sum(), slope, rtol=1e-2)


def test_the_logits_are_never_there_as_a_whole(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_ROWS", 6)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 1)
    base = tiny_base()
    own, teacher, size = states(base, 0), states(base, 1), base.layout.vocab_size
    largest = [
        max(sizes(jax.make_jaxpr(jax.grad(lambda x, f=f: f(base.model, x, teacher, 1.0).sum()))(own).jaxpr))
        for f in (divergences, dense)
    ]
    assert largest[1] == math.prod(own.shape[:2]) * size > 4 * largest[0]


def test_gradients_that_float16_cannot_hold():
    """They are stored times a factor, and a scaled loss brings them back."""
    base = tiny_base(dtype="float16")
    own = states(base, 0)
    near = own * 1.002
    cotangent = jnp.full((B, M), 2.0**15)
    found, expected = (
        np.asarray(jax.vjp(lambda x, f=f: f(base.model, x, near, 50.0), own)[1](cotangent)[0], np.float32)
        for f in (divergences, dense)
    )
    assert 0 < np.abs(expected).max() / 2**15 < 6e-5, "subnormal in float16"
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


def test_populations_are_mapped():
    base = tiny_base()
    several = jnp.stack([states(base, seed) for seed in range(3)])
    teacher = states(base, 9)
    one = functools.partial(divergences, base.model)
    found = jax.vmap(lambda x: one(x, teacher, 1.0))(several)
    np.testing.assert_allclose(found, jnp.stack([one(x, teacher, 1.0) for x in several]), rtol=1e-5)
