"""Losses of hand-made rows against optax and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.batches import Rows
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import TargetScores, group_scores, scores_of_logits
from spt_jax.models.attention import Stream
from spt_jax.training.losses import LossConfig, verbalizer_loss, vocabulary_loss

V = 11


def rows_of(targets, *, labels=((0,),), example_weights=((1.0,),)) -> Rows:
    """Rows from lists of (output, id, weight, group), padded to the longest; a row has as many examples as labels."""
    width = max(map(len, targets))
    padded = np.asarray([[*row, *[(0, 0, 0.0, 0)] * (width - len(row))] for row in targets])
    outputs, ids, weights, groups = np.moveaxis(padded, -1, 0)
    place = np.zeros((len(targets), 1), np.int32)
    return Rows(
        ids=place,
        stream=Stream(place, place, place),
        outputs=place,
        target_outputs=np.asarray(outputs, np.int32),
        target_ids=np.asarray(ids, np.int32),
        target_weights=np.asarray(weights, np.float32),
        target_groups=np.asarray(groups, np.int32),
        labels=np.asarray(labels, np.int32),
        example_weights=np.asarray(example_weights, np.float32),
        examples=np.zeros_like(labels, np.int32),
    )


def random_logits(*shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(0).standard_normal((*shape, V)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_gradient(loss, logits, rows: Rows, choices: int = 1, smoothing: float = 0.0):
    """The loss's (sum, weight), and the gradient of the sum for the logits."""
    return jax.value_and_grad(
        lambda logits: loss(scores_of_logits(logits, rows), rows, choices, smoothing), has_aux=True
    )(logits)


@jax.jit
def optax_loss(logits, one_hot, smoothing):
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_vocabulary_loss_is_optax_cross_entropy(smoothing):
    """Two rows, one output that predicts two targets, weights that differ, and padding."""
    logits = random_logits(2, 3)
    targets = [[(0, 5, 1.0, 0), (2, 7, 0.5, 0), (2, 1, 2.0, 1)], [(1, 10, 3.0, 0)]]
    (total, weight), _ = value_and_gradient(vocabulary_loss, logits, rows_of(targets), 1, smoothing)
    places = [(row, *target) for row, members in enumerate(targets) for target in members]
    chosen = np.stack([logits[row, output] for row, output, *_ in places])
    weights = np.asarray([own for *_, own, _ in places])
    losses = optax_loss(chosen, np.eye(V)[[token for _, _, token, *_ in places]], smoothing)
    np.testing.assert_allclose(total, (weights * losses).sum(), rtol=1e-6)
    assert weight == weights.sum() == 6.5


def test_smoothing_over_capped_logits_is_refused():
    """Their mean would need them all at once."""
    rows = rows_of([[(0, 3, 1.0, 0), (0, 5, 1.0, 0)]])
    scores = TargetScores(jnp.asarray([[-1.0, -2.0]]), None)
    assert vocabulary_loss(scores, rows, 1, 0.0) == (3.0, 2.0)
    with pytest.raises(ConfigError, match="logits are capped"):
        vocabulary_loss(scores, rows, 1, 0.1)


def test_smoothing_has_its_minimum_at_the_smoothed_distribution():
    """At logits log(q) of the smoothed labels q the gradient is zero, and the loss their entropy."""
    q = np.full(V, 0.3 / V)
    q[4] += 0.7
    logits, rows = np.log(q, dtype=np.float32)[None, None], rows_of([[(0, 4, 1.0, 0)]])
    (total, _), gradient = value_and_gradient(vocabulary_loss, logits, rows, 1, 0.3)
    np.testing.assert_allclose(total, -(q * np.log(q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    assert np.abs(value_and_gradient(vocabulary_loss, logits, rows)[1]).max() > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_token_verbalizers_are_a_softmax_over_their_logits(smoothing):
    """Also where another token takes nearly all of the vocabulary's probability."""
    logits = random_logits(1, 2)
    logits[0, :, 9] = 40.0
    ids, labels, weights = [2, 7, 4], [1, 2], [1.0, 0.25]
    places = [(example, i) for example in range(2) for i in range(3)]
    targets = [(example, ids[i], weights[example], 3 * example + i) for example, i in places]
    rows = rows_of([targets], labels=[labels], example_weights=[weights])
    (total, weight), gradient = value_and_gradient(verbalizer_loss, logits, rows, 3, smoothing)
    losses = np.asarray(weights) * optax_loss(logits[0][:, ids], np.eye(3)[labels], smoothing)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    assert weight == 1.25
    np.testing.assert_allclose(np.asarray(gradient)[0, :, 9], 0.0, atol=1e-5)


def test_longer_verbalizers_are_scored_as_sequences():
    """Choices of 1, 2 and 3 ids share their first output; a score is the product of its ids' probabilities."""
    logits = random_logits(1, 4)
    choices = [[(0, 3)], [(0, 5), (1, 6)], [(0, 5), (2, 8), (3, 1)]]
    targets = [[(output, token, 1.0, group) for group, choice in enumerate(choices) for output, token in choice]]
    rows = rows_of(targets, labels=[[2]])
    probabilities = np.exp(logits[0].astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    scores = np.asarray([np.prod([probabilities[output, token] for output, token in choice]) for choice in choices])
    ours = jax.jit(lambda logits: group_scores(scores_of_logits(logits, rows), rows, 3))(logits)
    np.testing.assert_allclose(np.exp(ours[0, 0]), scores, rtol=1e-5)
    (total, weight), _ = value_and_gradient(verbalizer_loss, logits, rows, 3)
    np.testing.assert_allclose(total, -np.log(scores[2] / scores.sum()), rtol=1e-5)
    assert weight == 1.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("loss", "choices"), [(vocabulary_loss, 1), (verbalizer_loss, 2)])
def test_padding_weighs_nothing_and_gives_no_nan(loss, choices, smoothing):
    """The second row is all padding, with logits far beyond any model's."""
    logits = random_logits(2, 2)
    rows = rows_of(
        [[(0, 2, 1.0, 0), (1, 3, 1.0, 1)], []],
        labels=[[1, 0], [0, 0]],
        example_weights=[[1.0, 0.0], [0.0, 0.0]],
    )
    sums, gradient = value_and_gradient(loss, logits, rows, choices, smoothing)
    logits[1] *= 1e30
    far, far_gradient = value_and_gradient(loss, logits, rows, choices, smoothing)
    np.testing.assert_array_equal(sums, far)
    assert sums[1] == (2.0 if choices == 1 else 1.0)
    assert np.abs(gradient[0]).max() > 0.01
    assert not np.asarray(far_gradient[1]).any()


def test_sums_of_parts_make_the_whole():
    """Losses are sums and weights: rows may be split in any way."""
    logits = random_logits(4, 3)
    targets = [[(i, 2 + i + row, 1.0 + row, i) for i in range(1 + row % 3)] for row in range(4)]
    rows = rows_of(targets, labels=[[0]] * 4, example_weights=[[1.0]] * 4)
    whole, gradient = value_and_gradient(vocabulary_loss, logits, rows, 1, 0.1)
    halves = [
        value_and_gradient(vocabulary_loss, logits[part], jax.tree.map(lambda a, p=part: a[p], rows), 1, 0.1)
        for part in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.sum([sums for sums, _ in halves], axis=0), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.concatenate([part for _, part in halves]), rtol=1e-5, atol=1e-7)


def test_several_choices_have_no_loss_over_the_vocabulary():
    rows = rows_of([[(0, 2, 1.0, 0), (0, 3, 1.0, 1)]])
    with pytest.raises(ConfigError, match="one target"):
        value_and_gradient(vocabulary_loss, random_logits(1, 1), rows, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"label_smoothing": float("nan")},
        {"class_weights": (1.0, -1.0)},
        {"class_weights": (0.0, 0.0)},
        {"class_weights": (1.0, float("nan"))},
        {"class_weights": (1.0, float("inf"))},
    ],
    ids=str,
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError, match=f"loss.{next(iter(options))}"):
        LossConfig(**options)
