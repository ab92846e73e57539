"""Objectives of hand-made rows against optax and closed forms, and what `prepare` returns reaches the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.batches import Rows, pack, place_batch, plan_batches
from spt_jax.data.examples import digest
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.forward import group_scores, output_logits, scores_of_logits, target_scores
from spt_jax.models.attention import Stream
from spt_jax.models.model import TargetScores
from spt_jax.prompts import VirtualPrompt
from spt_jax.testing import tiny_base
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import (
    CrossEntropy,
    Objective,
    SpanCrossEntropy,
    VerbalizerCrossEntropy,
    prepare_examples,
)
from tests.examples import VIRTUAL, VOCAB, random_examples

V = 11


base_of = functools.cache(tiny_base)


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


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(objective: Objective, logits, rows: Rows):
    """The loss's (sum, weight), and the gradient of the sum for the logits."""
    return jax.value_and_grad(lambda logits: objective.loss(scores_of_logits(logits, rows), rows), has_aux=True)(logits)


@jax.jit
def optax_loss(logits, one_hot, smoothing):
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_vocabulary_loss_is_optax_cross_entropy(smoothing):
    """Two rows, one output that predicts two targets, weights that differ, and padding."""
    logits = random_logits(2, 3)
    targets = [[(0, 5, 1.0, 0), (2, 7, 0.5, 0), (2, 1, 2.0, 1)], [(1, 10, 3.0, 0)]]
    (total, weight), _ = value_and_gradient(CrossEntropy(label_smoothing=smoothing), logits, rows_of(targets))
    places = [(row, *target) for row, members in enumerate(targets) for target in members]
    chosen = np.stack([logits[row, output] for row, output, *_ in places])
    weights = np.asarray([own for *_, own, _ in places])
    losses = optax_loss(chosen, np.eye(V)[[token for _, _, token, *_ in places]], smoothing)
    np.testing.assert_allclose(total, (weights * losses).sum(), rtol=1e-6)
    assert weight == weights.sum() == 6.5


def test_smoothing_over_capped_logits_is_refused():
    """Their mean would need them all at once."""
    rows = rows_of([[(0, 3, 1.0, 0), (0, 5, 1.0, 0)]])
    scores = TargetScores(jnp.asarray([[[-1.0], [-2.0]]]), None)
    assert CrossEntropy().loss(scores, rows) == (3.0, 2.0)
    with pytest.raises(ConfigError, match="logits are capped"):
        CrossEntropy(label_smoothing=0.1).loss(scores, rows)


def test_smoothing_has_its_minimum_at_the_smoothed_distribution():
    """At logits log(q) of the smoothed labels q the gradient is zero, and the loss their entropy."""
    q = np.full(V, 0.3 / V)
    q[4] += 0.7
    logits, rows = np.log(q, dtype=np.float32)[None, None], rows_of([[(0, 4, 1.0, 0)]])
    (total, _), gradient = value_and_gradient(CrossEntropy(label_smoothing=0.3), logits, rows)
    np.testing.assert_allclose(total, -(q * np.log(q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    assert np.abs(value_and_gradient(CrossEntropy(), logits, rows)[1]).max() > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_token_verbalizers_are_a_softmax_over_their_logits(smoothing):
    """Also where another token takes nearly all of the vocabulary's probability."""
    logits = random_logits(1, 2)
    logits[0, :, 9] = 40.0
    ids, labels, weights = [2, 7, 4], [1, 2], [1.0, 0.25]
    places = [(example, i) for example in range(2) for i in range(3)]
    targets = [(example, ids[i], weights[example], 3 * example + i) for example, i in places]
    rows = rows_of([targets], labels=[labels], example_weights=[weights])
    (total, weight), gradient = value_and_gradient(
        VerbalizerCrossEntropy(choices=3, label_smoothing=smoothing), logits, rows
    )
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
    (total, weight), _ = value_and_gradient(VerbalizerCrossEntropy(choices=3), logits, rows)
    np.testing.assert_allclose(total, -np.log(scores[2] / scores.sum()), rtol=1e-5)
    assert weight == 1.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("objective", "weight"), [(CrossEntropy(), 2.0), (VerbalizerCrossEntropy(choices=2), 1.0)], ids=str
)
def test_padding_weighs_nothing_and_gives_no_nan(objective, weight, smoothing):
    """The second row is all padding, with logits far beyond any model's."""
    logits = random_logits(2, 2)
    rows = rows_of(
        [[(0, 2, 1.0, 0), (1, 3, 1.0, 1)], []],
        labels=[[1, 0], [0, 0]],
        example_weights=[[1.0, 0.0], [0.0, 0.0]],
    )
    objective = dataclasses.replace(objective, label_smoothing=smoothing)
    sums, gradient = value_and_gradient(objective, logits, rows)
    logits[1] *= 1e30
    far, far_gradient = value_and_gradient(objective, logits, rows)
    np.testing.assert_array_equal(sums, far)
    assert sums[1] == weight
    assert np.abs(gradient[0]).max() > 0.01
    assert not np.asarray(far_gradient[1]).any()


def test_sums_of_parts_make_the_whole():
    """Losses are sums and weights: rows may be split in any way."""
    logits = random_logits(4, 3)
    targets = [[(i, 2 + i + row, 1.0 + row, i) for i in range(1 + row % 3)] for row in range(4)]
    rows = rows_of(targets, labels=[[0]] * 4, example_weights=[[1.0]] * 4)
    objective = CrossEntropy(label_smoothing=0.1)
    whole, gradient = value_and_gradient(objective, logits, rows)
    halves = [
        value_and_gradient(objective, logits[part], jax.tree.map(lambda a, p=part: a[p], rows))
        for part in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.sum([sums for sums, _ in halves], axis=0), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.concatenate([part for _, part in halves]), rtol=1e-5, atol=1e-7)


def test_several_choices_have_no_loss_over_the_vocabulary():
    examples = random_examples("choices", 2)
    with pytest.raises(ConfigError, match="one target"):
        prepare_examples(CrossEntropy(), base_of(), examples)
    targets = [example.as_target() for example in examples]
    assert prepare_examples(CrossEntropy(), base_of(), targets) is targets


def test_several_ids_are_scored_at_each_target():
    """As by a model that computes all logits, and by one that never does."""
    base, examples = base_of(), random_examples("target", 4)
    batch = place_batch(pack(examples, plan_batches(examples, lead=0, batch_size=4)), base.mesh)
    virtual = VirtualPrompt(tokens=jnp.zeros((VIRTUAL, base.config.width)))
    ids = np.random.default_rng(0).integers(0, VOCAB, (*batch.rows.target_ids.shape, 3))
    ids[:, :, 1] = batch.rows.target_ids
    ids = jnp.asarray(ids, jnp.int32)
    logits = output_logits(base.model, virtual, None, batch.rows)
    scores = target_scores(base.model, virtual, None, batch.rows, ids)
    own = target_scores(base.model, virtual, None, batch.rows)
    assert scores.log_probabilities.shape == ids.shape
    expected = scores_of_logits(logits, batch.rows, ids).log_probabilities
    np.testing.assert_allclose(scores.log_probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(scores.log_probabilities[:, :, 1], own.log_probabilities[:, :, 0], atol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepares(Objective):
    """Prepares the same tree for every example, or what is given for each."""

    results: tuple

    def prepare(self, base, examples):
        return list(self.results)


def test_what_is_prepared_reaches_the_rows():
    """Each example's arrays are in its slot, whatever row it is packed into; padding is 0."""
    examples = random_examples("target", 6)
    objective = Prepares(results=tuple({"a": np.float32(e.index + 1), "b": np.full(2, -e.index)} for e in examples))
    examples = prepare_examples(objective, base_of(), examples)
    rows = pack(examples, plan_batches(examples, lead=0, batch_size=6)).rows
    real = rows.examples >= 0
    assert rows.extra["b"].shape == (*rows.examples.shape, 2)
    np.testing.assert_array_equal(rows.extra["a"], np.where(real, rows.examples + 1, 0))
    np.testing.assert_array_equal(rows.extra["b"][..., 1], np.where(real, -rows.examples, 0))
    assert digest(examples) != digest([dataclasses.replace(e, extra=None) for e in examples])


def test_wrong_results_of_prepare_are_refused():
    examples = random_examples("target", 2)
    with pytest.raises(ConfigError, match="prepare returned 1 results for 2 examples"):
        prepare_examples(Prepares(results=(1.0,)), base_of(), examples)
    examples = prepare_examples(Prepares(results=(np.zeros(2), np.zeros(3))), base_of(), examples)
    with pytest.raises(DataError, match=r"record 2: what the objective prepared is .*3.*, for record 1 it is .*2"):
        pack(examples, plan_batches(examples, lead=0, batch_size=2))


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (LossConfig(), CrossEntropy()),
        (LossConfig(over="vocabulary", label_smoothing=0.2), CrossEntropy(label_smoothing=0.2)),
        (LossConfig(over="verbalizers"), VerbalizerCrossEntropy(choices=3)),
        (LossConfig(over="span"), SpanCrossEntropy()),
    ],
    ids=str,
)
def test_a_config_builds_its_objective(config, objective):
    assert config.objective(3) == objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VerbalizerCrossEntropy(choices=0), "choices is 0; it must be at least 1"),
        (lambda: VerbalizerCrossEntropy(choices=2, label_smoothing=-1.0), r"label_smoothing is -1\.0"),
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing is 1\.0; it must be in \[0, 1\)"),
        (lambda: LossConfig(over="verbalisers"), "loss.over is 'verbalisers'; did you mean 'verbalizers'"),
        (lambda: LossConfig(over="span", label_smoothing=0.1), "not compatible with loss.over=span"),
    ],
)
def test_a_wrong_objective_is_refused_at_construction(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


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
