"""Distillation of the distribution over classes: loss, gradient, packing, and what a run reports."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.remembered import text_ids
from spt_jax.errors import ConfigError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.evaluation.classes import class_agreement
from spt_jax.prompts import PromptTuning
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import ClassDistillation, prepare_examples
from spt_jax.training.step import measured_gradient
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL, random_examples, sequence_logits
from tests.jobs import ROOT, write_task

TEXT = "good and nice, bad and bad\n"
CHOICES = 3


@functools.cache
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def examples():
    found = random_examples("choices", 5)
    assert {len(example.choices) for example in found} == {CHOICES}
    return found


def tokens():
    return jnp.asarray(np.random.default_rng(3).normal(0, 0.3, (VIRTUAL, base().layout.width)), jnp.float32)


def class_scores(ids_of) -> np.ndarray:
    """The log-probability of each choice of each example, one sequence at a time."""
    rows = []
    for example in examples():
        row = []
        for choice in example.choices:
            ids = ids_of(np.concatenate([example.ids, choice]))
            logits = np.asarray(jax.nn.log_softmax(sequence_logits(base(), tokens(), ids)))
            at = np.arange(len(ids) - len(choice), len(ids))
            row.append(logits[at - 1, ids[at]].sum())
        rows.append(row)
    return np.asarray(rows, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK_COMPILE)
def gradient_of(objective, model, params, batch, microbatches=1):
    return measured_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch, microbatches)


@functools.cache
def layout_of(file, packing, microbatches=1):
    objective = ClassDistillation(text=file, temperature=5.0, choices=CHOICES)
    prepared = prepare_examples(objective, base(), examples())
    limits = {"multiple": microbatches} if microbatches > 1 else {}
    plan = plan_batches(prepared, batch_size=5, lead=len(HEAD), packing=packing, **limits)
    batch = place_batch(pack(prepared, plan), base().mesh)
    return jax.device_get(gradient_of(objective, base().model, {"tokens": tokens()}, batch, microbatches))


def test_the_loss_is_the_divergence_of_the_classes(file):
    text = text_ids(base(), TEXT)
    teacher = class_scores(lambda ids: ids_after_text(base(), text, ids))
    student = class_scores(lambda ids: ids)
    p, q = (np.exp(own / 5.0) / np.exp(own / 5.0).sum(-1, keepdims=True) for own in (teacher, student))
    loss, _, weight, _ = layout_of(file, True)
    np.testing.assert_allclose(loss, 25 * (p * np.log(p / q)).sum(-1).mean(), rtol=1e-3)
    assert weight == len(examples())
    p, q = (np.exp(own) / np.exp(own).sum(-1, keepdims=True) for own in (teacher, student))
    found = class_agreement(np.float32(student), np.float32(teacher))
    np.testing.assert_allclose(found["class_kl"], (p * np.log(p / q)).sum(-1).mean(), rtol=1e-3)
    assert found["class_agreement"] == np.mean(p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("layout", [(False, 1), (False, 5)])
def test_packing_and_microbatches_change_nothing(file, layout):
    loss, gradient, *_ = layout_of(file, True)
    theirs = layout_of(file, *layout)
    np.testing.assert_allclose(theirs[0], loss, rtol=1e-5)
    expected = gradient["tokens"]
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(theirs[1]["tokens"], expected, atol=1e-5 * np.abs(expected).max())


def test_a_run_reports_and_chooses_by_the_classes(tmp_path):
    write_task(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(tmp_path / "run")]
    for split in ("train", "validation", "test"):
        line += [f"--data.{split}", str(tmp_path / f"{split}.jsonl")]
    line += ["--base.path", str(tmp_path / "model"), "--data.prompt", "<soft>{text}\n", "--data.target", " {label}"]
    line += ["--data.verbalizers", "good=good", "bad=bad", "--method.length", "3", "--train.steps", "12"]
    line += ["--train.evaluate-every", "4", "--train.batch-size", "8", "--loss.over", "class_distillation"]
    assert train.main([*line, "--loss.text", str(tmp_path / "text.txt")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    soft, bare = (results["validation"][name] for name in ("soft_prompt", "no_prompt"))
    assert soft["class_kl"] < bare["class_kl"] and 0 <= soft["class_agreement"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["validation"]["class_kl"] for line in lines if "validation" in line}
    assert results["best_step"] == min(validated, key=lambda step: validated[step])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"top_k": 8}, "loss.top_k is not for class_distillation"),
        ({"answer_tokens": 3}, "loss.answer_tokens is not for class_distillation"),
        ({"answer_temperature": 0.5}, "loss.answer_temperature is not for class_distillation"),
        ({"answer_tokens": 3, "study": 2}, "loss.answer_tokens is not for class_distillation"),
        ({"study_tokens": 9}, "loss.study_tokens is not for class_distillation"),
        ({"choices": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit(file, options, problem):
    with pytest.raises(ConfigError, match=problem):
        ClassDistillation(text=file, **options)


def test_examples_must_be_prepared(file):
    batch = pack(examples(), plan_batches(examples(), batch_size=5, lead=len(HEAD)))
    objective = ClassDistillation(text=file, choices=CHOICES)
    with pytest.raises(ConfigError, match="call prepare_examples"):
        gradient_of(objective, base().model, {"tokens": tokens()}, place_batch(batch, base().mesh))
