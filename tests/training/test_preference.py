"""Objectives of pairs: values, refusals, and that batches, packing, meshes and microbatches change nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.preferences import PairScores
from spt_jax.errors import ConfigError
from spt_jax.evaluation import evaluate as module
from spt_jax.evaluation.evaluate import reference_scores
from spt_jax.inference.forward import scores_of_logits
from spt_jax.prompts import PromptTuning
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base
from spt_jax.training.config import LossConfig, given
from spt_jax.training.objectives import Dpo, Ipo, Orpo, SimPo, prepare_examples
from spt_jax.training.step import loss_and_gradient, measured_gradient
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL, VOCAB, random_examples, sequence_score
from tests.pairs import paper_loss, random_pairs
from tests.training.test_objectives import random_logits, rows_of

OBJECTIVES = {
    "dpo": Dpo(beta=0.3, label_smoothing=0.1),
    "ipo": Ipo(beta=0.2),
    "simpo": SimPo(beta=2.0, gamma=0.5),
    "orpo": Orpo(strength=0.4),
}
SCORES = PairScores(
    np.asarray([[-3.0, -5.0], [-4.5, -2.0], [-1.5, -9.0]], np.float32),
    np.asarray([[2, 3], [5, 1], [1, 6]]),
    np.asarray([[-4.0, -4.5], [-4.0, -3.0], [-2.0, -8.0]], np.float32),
)


@functools.cache
def base_of(**axes: int):
    return tiny_base("llama", mesh=make_mesh(MeshConfig(**axes)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_papers(name):
    objective = OBJECTIVES[name]
    ours = objective.losses(dataclasses.replace(SCORES, reference=SCORES.reference if name in ("dpo", "ipo") else None))
    values, lengths, reference = (
        np.float64(part) for part in (SCORES.log_probabilities, SCORES.lengths, SCORES.reference)
    )
    theirs = paper_loss(name, dataclasses.asdict(objective), values, lengths, reference, np)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_ipo_has_its_minimum_at_its_margin_and_dpo_has_none():
    """IPO is zero where the log-ratios differ by 1 / (2 beta); DPO keeps falling."""

    def at(margin):
        return PairScores(np.asarray([[margin, 0.0]], np.float32), np.ones((1, 2), int), np.zeros((1, 2), np.float32))

    ipo, dpo = Ipo(beta=0.25), Dpo(beta=0.25)
    assert ipo.losses(at(2.0))[0] == 0 and ipo.losses(at(1.0))[0] == ipo.losses(at(3.0))[0] == 1
    assert dpo.losses(at(2.0))[0] > dpo.losses(at(3.0))[0] > dpo.losses(at(30.0))[0] > 0
    np.testing.assert_allclose(dpo.losses(at(0.0)), np.log(2), rtol=1e-6)


def test_log_odds_of_probabilities_near_one_and_near_zero_are_finite():
    scores = PairScores(np.asarray([[-1e-12, -200.0]], np.float32), np.ones((1, 2), int))
    value, slope = jax.value_and_grad(
        lambda values: Orpo().losses(dataclasses.replace(scores, log_probabilities=values)).sum()
    )(jnp.asarray(scores.log_probabilities))
    assert np.isfinite(value) and np.isfinite(slope).all()
    np.testing.assert_allclose(Orpo(strength=1.0).rewards(scores)[0, 1], -200.0, rtol=1e-6)


def test_metrics_of_hand_made_rows():
    """Two pairs in one row, and a row of padding: accuracy, margin and log-ratio are weighted means."""
    logits = random_logits(2, 4)
    targets = [[(0, 5, 1.0, 0), (1, 6, 1.0, 0), (0, 7, 1.0, 1), (2, 3, 1.0, 2), (3, 4, 1.0, 3)], []]
    rows = rows_of(targets, labels=[[0, 0], [0, 0]], example_weights=[[1.0, 3.0], [0.0, 0.0]])
    reference = np.zeros((2, 2, 2), np.float32)
    reference[0] = [[-5.0, -1.0], [-2.0, -2.5]]
    rows = dataclasses.replace(rows, extra=reference)
    logs = np.asarray(jax.nn.log_softmax(logits[0]))
    values = np.asarray([[logs[0, 5] + logs[1, 6], logs[0, 7]], [logs[2, 3], logs[3, 4]]])
    ratios = values - reference[0]
    margins, weights = 0.3 * (ratios[:, 0] - ratios[:, 1]), np.asarray([1.0, 3.0])
    expected = {
        "accuracy": ((margins > 0) * weights).sum() / 4,
        "reward_margin": (margins * weights).sum() / 4,
        "chosen_log_ratio": (ratios[:, 0] * weights).sum() / (2 * 1 + 1 * 3),
    }
    found = jax.jit(lambda logits, rows: Dpo(beta=0.3).metrics(scores_of_logits(logits, rows), rows))(logits, rows)
    assert set(found) == set(Dpo.metric_names)
    for name, (total, weight) in found.items():
        np.testing.assert_allclose(total / weight, expected[name], rtol=1e-5)


def test_reference_scores_are_those_of_each_answer_after_the_context_without_virtual_tokens():
    """And packing, batches and the order of the pairs change nothing."""
    base, pairs = base_of(), random_pairs(4)
    expected = []
    for pair, choice in itertools.product(pairs, (0, 1)):
        real = pair.ids[pair.ids < VOCAB]
        ids = np.concatenate([real, pair.choices[choice]])
        expected.append(sequence_score(base, tokens(base)["tokens"], ids, np.arange(len(ids)) >= len(real))[0])
    found = reference_scores(base, pairs, batch_size=2)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)
    back = reference_scores(base, pairs[::-1], batch_size=4, packing=False)[::-1]
    np.testing.assert_allclose(back, found, rtol=1e-5)


def tokens(base):
    return {"tokens": jnp.asarray(np.random.default_rng(3).normal(0, 0.3, (VIRTUAL, base.layout.width)), jnp.float32)}


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK_COMPILE)
def _gradient(objective, model, params, batch, microbatches):
    return measured_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch, microbatches)


LAYOUTS = [
    {"packing": False, "lead": 0},
    {"microbatches": 2, "axes": {"data": 2, "tensor": 2}},
    {"axes": {"fsdp": 2, "sequence": 2}},
]


@functools.cache
def layout_of(packing: bool = True, lead: int = len(HEAD), microbatches: int = 1, axes: tuple = ()):
    """Loss, gradient, weight and metrics of six pairs."""
    objective, base = Dpo(beta=0.3), base_of(**dict(axes))
    examples = prepare_examples(objective, base, random_pairs(6))
    limits = multiples(base.mesh, microbatches)
    batch = pack(examples, plan_batches(examples, batch_size=6, lead=lead, packing=packing, **limits))
    found = _gradient(objective, base.model, tokens(base), place_batch(batch, base.mesh), microbatches)
    return jax.device_get(found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_same_loss_gradient_and_metrics(layout):
    loss, gradient, weight, metrics = layout_of()
    theirs = layout_of(**{**layout, "axes": tuple(layout.get("axes", {}).items())})
    np.testing.assert_allclose(theirs[0], loss, rtol=1e-5)
    np.testing.assert_allclose(theirs[1]["tokens"], gradient["tokens"], atol=1e-5 * np.abs(gradient["tokens"]).max())
    assert theirs[2] == weight == 6
    for name, value in metrics.items():
        np.testing.assert_allclose(theirs[3][name], value, rtol=1e-4, err_msg=name)


def test_reference_scores_are_computed_once_and_not_without_a_reference(monkeypatch):
    counted = []
    scored = module._scored
    monkeypatch.setattr(module, "_scored", lambda *inputs: counted.append(len(inputs[1])) or scored(*inputs))
    for objective in (Dpo(), SimPo(), Orpo()):
        prepare_examples(objective, base_of(), random_pairs(4))
    assert counted == [4]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Dpo(beta=0.0), "beta is 0.0; it must be positive"),
        (lambda: Dpo(label_smoothing=0.5), r"must be in \[0, 0.5\)"),
        (lambda: Ipo(beta=float("inf")), "positive and finite"),
        (lambda: SimPo(gamma=-1.0), "SimPo.gamma is -1.0"),
        (lambda: Orpo(strength=-0.1), "Orpo.strength"),
        (lambda: LossConfig(over="ipo", label_smoothing=0.1), "label_smoothing is not compatible with loss.over=ipo"),
        (
            lambda: prepare_examples(Dpo(), base_of(), random_examples("choices", 2)),
            "record 1 has 3; .* task preference",
        ),
        (lambda: prepare_examples(SimPo(), base_of(), random_examples("target", 2)), "record 1 has 0"),
        (lambda: Dpo().losses(dataclasses.replace(SCORES, reference=None)), "scores of the bare base"),
    ],
)
def test_refusals(make, problem):
    with pytest.raises(ConfigError, match=problem):
        make()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_options_go_through_the_config(objective):
    assert LossConfig.of(objective).objective(2) == given(objective).objective(2) == objective


def test_loss_and_gradient_returns_the_loss_and_its_slope():
    """By central differences along a random direction."""
    base, pairs, objective = base_of(), random_pairs(4), Orpo(strength=0.4)
    batch = place_batch(pack(pairs, plan_batches(pairs, lead=len(HEAD), batch_size=4)), base.mesh)
    function = jax.jit(functools.partial(loss_and_gradient, PromptTuning(length=VIRTUAL), objective))
    direction = np.random.default_rng(9).normal(size=(VIRTUAL, base.layout.width)).astype(np.float32)
    start = tokens(base)["tokens"]
    sides = [function(base.model, {"tokens": start + step * direction}, batch)[0] for step in (-1e-3, 1e-3)]
    _, gradient, weight = function(base.model, {"tokens": start}, batch)
    assert weight == 4
    np.testing.assert_allclose((sides[1] - sides[0]) / 2e-3, np.sum(gradient["tokens"] * direction), rtol=2e-2)
