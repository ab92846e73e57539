"""The normaliser of a large vocabulary, taken in chunks, against the whole of the logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models import vocabulary
from spt_jax.models.vocabulary import log_sum_exp

B, Q, D, V = 2, 37, 8, 300


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    """States, a matrix and a cotangent; one state has a logit far above the others'."""
    keys = jax.random.split(jax.random.key(0), 3)
    states, matrix = jax.random.normal(keys[0], (B, Q, D)), jax.random.normal(keys[1], (V, D))
    return states.at[0, 3].set(30 * matrix[7]), matrix, jax.random.normal(keys[2], (B, Q))


def plain(states, matrix, cap=None, bias=None):
    logits = states @ matrix.T + (0 if bias is None else bias[None, None])
    return jax.nn.logsumexp(logits if cap is None else cap * jnp.tanh(logits / cap), axis=-1)


@pytest.mark.parametrize(("cap", "biased"), [(None, False), (5.0, False), (None, True), (5.0, True)])
@pytest.mark.parametrize("rows", [1, 10, 30, 1000])
def test_chunks_are_the_whole(rows, cap, biased, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_ROWS", rows)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 1)
    states, matrix, cotangent = arrays()
    bias = 3 * jax.random.normal(jax.random.key(1), (V,)) if biased else None
    compiled = jax.jit(log_sum_exp, static_argnums=2)
    np.testing.assert_allclose(compiled(states, matrix, cap, bias), plain(states, matrix, cap, bias), rtol=1e-6)
    ours, pull = jax.vjp(lambda s: log_sum_exp(s, matrix, cap, bias), states)
    theirs, plain_pull = jax.vjp(lambda s: plain(s, matrix, cap, bias), states)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], plain_pull(cotangent)[0], rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
    """Sizes of all that a program computes, in its loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            program = getattr(inner, "jaxpr", inner)
            if hasattr(program, "eqns"):
                yield from sizes(program)


def test_the_logits_are_never_there_as_a_whole(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_ROWS", 10)
    monkeypatch.setattr(vocabulary, "CHUNK_LOGITS", 1)
    states, matrix, _ = arrays()
    chunked = jax.make_jaxpr(jax.grad(lambda s: log_sum_exp(s, matrix).sum()))(states)
    whole = jax.make_jaxpr(jax.grad(lambda s: plain(s, matrix).sum()))(states)
    assert max(sizes(whole.jaxpr)) == B * Q * V
    assert max(sizes(chunked.jaxpr)) <= 10 * V


def test_bfloat16_sums_in_float32():
    states, matrix, _ = (a.astype(jnp.bfloat16) for a in arrays())
    ours = log_sum_exp(states, matrix)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, plain(states.astype(jnp.float32), matrix.astype(jnp.float32)), rtol=1e-5)
