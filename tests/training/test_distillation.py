"""Distillation of a text: values, refusals, and that batches, packing, meshes and microbatches change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.remembered import system_ids, text_ids
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.after_text import agreement_with_text, examples_after_text, ids_after_text, top_tokens
from spt_jax.inference.forward import scores_of_logits
from spt_jax.prompts import PromptTuning, VirtualPrompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import Distillation, prepare_examples
from spt_jax.training.step import measured_gradient
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL, VOCAB, random_examples, sequence_logits
from tests.training.test_objectives import random_logits, rows_of

TEXT = "good and nice, bad and bad\n"


@functools.cache
def base_of(**axes: int):
    return tiny_base("llama", mesh=make_mesh(MeshConfig(**axes)))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def tokens(base):
    return jnp.asarray(np.random.default_rng(3).normal(0, 0.3, (VIRTUAL, base.layout.width)), jnp.float32)


def log_softmax(logits):
    logits = np.float64(logits) - np.max(logits, axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def distributions(base, examples, text, virtual):
    """Logits of the teacher and of the student at each target, from each sequence alone."""
    teacher, student = [], []
    for example in examples:
        longer = ids_after_text(base, text, example.ids)
        at = np.flatnonzero(example.predicted)
        from_end = len(example.ids) - at
        teacher += [*sequence_logits(base, virtual, longer)[len(longer) - from_end - 1]]
        student += [*sequence_logits(base, virtual, example.ids)[at - 1]]
    return np.stack(teacher), np.stack(student)


def expected_loss(teacher, student, k, temperature):
    """The loss as its docstring says, from whole distributions."""
    losses = []
    for log_p, log_q in zip(log_softmax(teacher), log_softmax(student), strict=True):
        top = np.argsort(-log_p)[:k]
        p, q = np.exp(log_p[top]), np.exp(log_q[top])
        if k < len(log_p):
            p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        p, q = (own ** (1 / temperature) / (own ** (1 / temperature)).sum() for own in (p, q))
        losses.append(temperature**2 * (p * np.log(p / q)).sum())
    return np.mean(losses)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK_COMPILE)
def _gradient(objective, model, params, batch, microbatches):
    return measured_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch, microbatches)


@functools.cache
def layout_of(file, k, temperature, packing=True, shared=True, microbatches=1, axes=()):
    """Loss, gradient, weight and metrics of six examples."""
    objective, base = Distillation(text=file, top_k=k, temperature=temperature), base_of(**dict(axes))
    examples = prepare_examples(objective, base, random_examples("spans", 6))
    limits = multiples(base.mesh, microbatches)
    batch = pack(
        examples, plan_batches(examples, batch_size=6, lead=len(HEAD) if shared else 0, packing=packing, **limits)
    )
    params = {"tokens": tokens(base)}
    return jax.device_get(_gradient(objective, base.model, params, place_batch(batch, base.mesh), microbatches))


@pytest.mark.parametrize(("k", "temperature"), [(5, 2.0), (VOCAB, 1.0), (0, 1.0)])
def test_loss_is_that_of_whole_distributions(file, k, temperature):
    base, examples = base_of(), random_examples("spans", 6)
    pairs = distributions(base, examples, text_ids(base, TEXT), tokens(base))
    loss, _, weight, _ = layout_of(file, k, temperature)
    np.testing.assert_allclose(loss, expected_loss(*pairs, k or VOCAB, temperature), rtol=2e-5)
    assert weight == sum(example.predicted.sum() for example in examples)


def test_with_the_whole_vocabulary_the_loss_is_the_reported_divergence(file):
    base, examples = base_of(), random_examples("spans", 6)
    text = text_ids(base, TEXT)
    virtual = VirtualPrompt(tokens=tokens(base))
    found = agreement_with_text(base, text, examples, len(HEAD), virtual, batch_size=4)
    np.testing.assert_allclose(found.divergence, layout_of(file, VOCAB, 1.0)[0], rtol=1e-5)
    teacher, student = distributions(base, examples, text, tokens(base))
    assert found.agreement == np.mean(teacher.argmax(-1) == student.argmax(-1))
    # The text itself, as token rows in place of the virtual tokens, agrees with itself.
    rows = np.concatenate([np.asarray([1]), VOCAB + np.arange(len(text) - 1), [17, 18, 50, 60]]).astype(np.int32)
    own = [dataclasses.replace(examples[0], ids=rows, predicted=np.arange(len(rows)) >= len(rows) - 2)]
    same = VirtualPrompt(tokens=base.model.embed(jnp.asarray(text[1:])))
    itself = agreement_with_text(base, text, own, 0, same)
    assert itself.agreement == 1 and abs(itself.divergence) < 1e-5


LAYOUTS = [
    {"packing": False, "shared": False},
    {"microbatches": 2, "axes": (("data", 2), ("tensor", 2))},
    {"axes": (("fsdp", 2), ("sequence", 2))},
]


@pytest.mark.parametrize(("k", "layout"), [*((5, layout) for layout in LAYOUTS), (0, LAYOUTS[1])], ids=str)
def test_every_layout_has_the_same_loss_and_gradient(file, k, layout):
    loss, gradient, weight, _ = layout_of(file, k, 2.0)
    theirs = layout_of(file, k, 2.0, **layout)
    np.testing.assert_allclose(theirs[0], loss, rtol=1e-5)
    np.testing.assert_allclose(theirs[1]["tokens"], gradient["tokens"], atol=1e-5 * np.abs(gradient["tokens"]).max())
    assert theirs[2] == weight


def test_weights_padding_and_a_rest_near_zero():
    """Of two examples in a row the first counts thrice; logits that leave no rest have a finite loss and gradient."""
    logits = np.asarray(random_logits(1, 4))
    rows = rows_of([[(0, 5, 3.0, 0), (1, 6, 3.0, 0), (2, 7, 1.0, 1)]], labels=[[0, 0]], example_weights=[[3.0, 1.0]])
    best = np.argsort(-logits[0], axis=-1)[:, :2]
    extra = {
        "ids": np.stack([best[:2], np.stack([best[2], [0, 0]])])[None].astype(np.int32),
        "log_probabilities": np.log(np.full((1, 2, 2, 2), 0.25, np.float32)),
        "log_rest": np.log(np.full((1, 2, 2), 0.5, np.float32)),
    }
    rows = jax.tree.map(jnp.asarray, dataclasses.replace(rows, extra=extra))
    objective = Distillation(text="unused", top_k=2)

    def loss(logits):
        return objective.loss(scores_of_logits(logits, rows, objective.scored_ids(rows)), rows)

    total, weight = loss(jnp.asarray(logits))
    q = np.exp(np.take_along_axis(log_softmax(logits[0]), best, -1))[:3]
    p, q = np.asarray([0.25, 0.25, 0.5]), np.concatenate([q, 1 - q.sum(-1, keepdims=True)], axis=-1)
    np.testing.assert_allclose(total, ((p * np.log(p / q)).sum(-1) * [3, 3, 1]).sum(), rtol=1e-5)
    assert weight == 7
    sure = jnp.asarray(np.where(np.arange(logits.shape[-1]) == best[:, :1], 200.0, 0.0)[None], jnp.float32)
    value, slope = jax.value_and_grad(lambda logits: loss(logits)[0])(sure)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_top_tokens_do_not_depend_on_batches_and_packing():
    base, examples = base_of(), random_examples("spans", 5)
    text = text_ids(base, TEXT)
    found = top_tokens(base, text, examples, 4, batch_size=2)
    back = top_tokens(base, text, examples[::-1], 4)[::-1]
    teacher = log_softmax(distributions(base, examples, text, tokens(base))[0])
    np.testing.assert_array_equal(np.concatenate([own.ids for own in found]), np.argsort(-teacher, -1)[:, :4])
    for one, other in zip(found, back, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=1e-5)
        total = np.exp(one.log_probabilities).sum(-1) + np.exp(one.log_rest)
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_the_text_comes_first_and_has_the_only_bos():
    base = base_of()
    text = text_ids(base, TEXT)
    example = random_examples("target", 1)[0]
    longer = examples_after_text(base, text, [example])[0]
    real = example.ids[example.ids < VOCAB]
    assert text[0] == real[0] == base.tokenizer.bos_token_id
    np.testing.assert_array_equal(longer.ids, np.concatenate([text, real[1:]]))
    np.testing.assert_array_equal(longer.ids[longer.predicted], example.ids[example.predicted])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: Distillation(text=file, top_k=-1), "top_k is -1; it must be at least 0"),
        (lambda file: Distillation(text=file, temperature=0.0), "temperature is 0.0; it must be positive"),
        (lambda file: Distillation(text=""), "loss.text is empty"),
        (lambda file: Distillation(text=file, answer_tokens=-1), "answer_tokens is -1"),
        (lambda file: LossConfig(over="distillation").resolved(), "loss.over=distillation needs loss.text"),
        (lambda file: Distillation(text=file, top_k=321).text_ids(base_of()), "top_k is 321, .* has 320 tokens"),
        (lambda file: system_ids(base_of(), TEXT), "chat template"),
    ],
)
def test_wrong_options(file, make, problem):
    with pytest.raises(ConfigError, match=problem):
        make(file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [(" \n", "the file is empty"), ("good " * 400, r"the text has [\d,]+ tokens and .* positions")],
)
def test_wrong_texts(tmp_path, text, problem):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(DataError, match=rf"loss.text=.*text.txt: .*{problem}"):
        Distillation(text=str(tmp_path / "text.txt")).text_ids(base_of())


def test_a_text_and_a_record_that_are_too_long_together():
    base = base_of()
    text = np.full(base.layout.max_positions - 10, 7, np.int32)
    with pytest.raises(DataError, match=r"record 1: the text has .* and the record 1\d, more than the .* positions"):
        examples_after_text(base, text, random_examples("spans", 1))
