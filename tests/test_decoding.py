"""What is sampled follows the distribution that the options describe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spt_jax.inference.decoding import RowSampling, choose


@functools.partial(jax.jit, static_argnums=2)
def _draws(scores, sampling, steps):
    """Ids [steps, B] drawn from the same scores [V] for every row and step."""
    batch = jnp.broadcast_to(scores[None], (sampling.numbers.shape[0], scores.shape[0]))
    return jax.lax.map(lambda step: choose(batch, step, sampling), jnp.arange(steps))


def draws(scores, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, rows=500, steps=40) -> np.ndarray:
    sampling = RowSampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(top_p),
        seed=jnp.uint32(seed),
        numbers=jnp.arange(rows),
    )
    return np.asarray(_draws(jnp.asarray(scores, jnp.float32), sampling, steps))


SCORES = np.asarray([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -4.0, 0.7])


def distribution(temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """What is sampled from: the definition, one token after another from the likeliest."""
    weights = np.exp(SCORES / temperature)
    order = np.argsort(-weights)[: top_k or None]
    total, kept, share = weights[order].sum(), [], 0.0
    for token in order:
        if share < top_p:
            kept.append(token)
        share += weights[token] / total
    result = np.zeros(len(SCORES))
    result[kept] = weights[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"top_k": 5, "top_p": 0.6, "temperature": 1.5},
        {"top_k": 100},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(options):
    expected = distribution(**options)
    counts = np.bincount(draws(SCORES, **options).reshape(-1), minlength=len(SCORES))
    assert counts.sum() == 20_000
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible], 20_000 * expected[possible]).pvalue > 1e-4


def test_rows_and_steps_are_independent():
    """Pairs of neighbouring steps, and of neighbouring rows, are distributed as the product."""
    ids, expected = draws(SCORES), distribution()
    size = len(SCORES)
    for first, second in ((ids[:-1:2], ids[1::2]), (ids[:, :-1:2], ids[:, 1::2])):
        counts = np.bincount((first * size + second).reshape(-1), minlength=size * size)
        product = np.outer(expected, expected).reshape(-1)
        likely = product * counts.sum() > 5
        observed = np.append(counts[likely], counts[~likely].sum())
        wanted = counts.sum() * np.append(product[likely], product[~likely].sum())
        assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_extreme_temperatures():
    tied = np.asarray([1.0, 3.0, 3.0, *[-np.inf] * 5])
    assert set(draws(tied, temperature=1e-30).reshape(-1)) == {1, 2}
    assert set(draws(tied, temperature=1e30).reshape(-1)) == {0, 1, 2}
    assert (draws(tied, temperature=0.0) == 1).all()
    assert (draws(tied, temperature=5.0, top_k=1) == 1).all()
