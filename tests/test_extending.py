"""The code in docs/extending.md adds a family, a method, an objective and a task, which then work like all others."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import spt_jax
from spt_jax.bases.families import FAMILIES
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig
from spt_jax.data.templates import CHECKS
from spt_jax.experiment.config import make_template, resolve
from spt_jax.inference.forward import output_logits
from spt_jax.models.attention import Stream
from spt_jax.models.quantized import KERNEL_ARRAYS
from spt_jax.prompts import METHODS
from spt_jax.serving.classify import Classifier
from spt_jax.tasks import TASKS
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import OBJECTIVES
from tests.jobs import ROOT

RECORDS = [{"text": text, "label": label} for text, label in (("yes", "H"), ("no", "L"), ("maybe so", "N"))]


@pytest.fixture(scope="module")
def page():
    """The names that the page defines. What it registers is removed again."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    names = {"__name__": "page"}
    registries = [
        (registry, dict(registry)) for registry in (FAMILIES, METHODS, OBJECTIVES, TASKS, CHECKS, KERNEL_ARRAYS)
    ]
    for block in blocks:
        exec(block, names)
    yield names
    for registry, before in registries:
        registry.clear()
        registry.update(before)
    transformers.CONFIG_MAPPING._extra_content.pop("smooth_llama")


def test_the_family_is_the_function_that_llama_is_with_its_activation(page, tmp_path):
    theirs = spt_jax.load_base(write_tiny_checkpoint(tmp_path / "llama", "llama", hidden_act="gelu_pytorch_tanh"))
    ours = spt_jax.load_base(write_tiny_checkpoint(tmp_path / "smooth", "smooth_llama"))
    assert ours.config == dataclasses.replace(theirs.config, family="smooth_llama")
    template = spt_jax.Template(prompt="{text}", target="{label}")
    encoder = spt_jax.Encoder(template, ours.tokenizer, ours.config.vocab_size, 64)
    examples = encoder.encode_all(RECORDS)
    plan = spt_jax.plan_batches(examples, lead=0, batch_size=3)
    rows = spt_jax.place_batch(spt_jax.pack(examples, plan), ours.mesh).rows
    one, other = (output_logits(base.model, None, None, rows) for base in (ours, theirs))
    np.testing.assert_array_equal(one, other)


def test_the_method_trains_and_its_prompt_is_saved_and_answers(page, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "base", "smooth_llama")
    base, method = spt_jax.load_base(directory), page["DirectionTuning"](length=4)
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    examples = encoder.encode_all(RECORDS)
    plan = spt_jax.plan_batches(examples, lead=encoder.head_length(examples), batch_size=3)
    config = spt_jax.resolve_optimizer(spt_jax.OptimizerConfig(), base.config.family, method.recipe)
    optimizer = spt_jax.make_optimizer(config, 20)
    state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
    step = spt_jax.make_train_step(base, method, optimizer)
    batch = spt_jax.place_batch(spt_jax.pack(examples, plan), base.mesh)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    virtual = method.materialize(state.params, base.model)
    np.testing.assert_allclose(jnp.linalg.norm(virtual.tokens, axis=1), state.params["length"], rtol=1e-5)
    spt_jax.save_prompt(tmp_path / "prompt", base, method, virtual, template)
    saved = spt_jax.load_prompt(tmp_path / "prompt", base)
    assert saved.method == method
    np.testing.assert_array_equal(saved.virtual.tokens, virtual.tokens)


def test_the_objective_is_its_formula_in_every_layout_and_trains(page):
    base, method, objective = tiny_base(), spt_jax.PromptTuning(length=4), page["FocalCrossEntropy"](gamma=1.5)
    assert LossConfig(over="focal").objective(1) == page["FocalCrossEntropy"]()
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    records = [{"text": record["text"], "label": record["label"] * (1 + i)} for i, record in enumerate(RECORDS)]
    plain = encoder.encode_all(records)
    examples = spt_jax.prepare_examples(objective, base, plain)
    optimizer = optax.sgd(0.5)
    losses = {}
    for packing in (True, False):
        plan = spt_jax.plan_batches(examples, lead=4, batch_size=3, packing=packing, multiple=3)
        batch = spt_jax.place_batch(spt_jax.pack(examples, plan), base.mesh)
        state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
        virtual = method.materialize(jax.tree.map(jnp.array, state.params), base.model)  # the step donates its state
        step = spt_jax.make_train_step(base, method, optimizer, objective, microbatches=3)
        for _ in range(8):
            state, metrics = step(state, batch)
            losses.setdefault(packing, []).append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4)
    assert losses[True][-1] < 0.9 * losses[True][0]
    alone = []
    for example in plain:
        plan = spt_jax.plan_batches([example], lead=0, batch_size=1, packing=False)
        rows = spt_jax.place_batch(spt_jax.pack([example], plan), base.mesh).rows
        logits = output_logits(base.model, virtual, None, rows)[0]
        chosen = jax.nn.log_softmax(logits)[rows.target_outputs[0], rows.target_ids[0]][rows.target_weights[0] > 0]
        alone.append(float(jnp.mean(-((1 - jnp.exp(chosen)) ** 1.5) * chosen)))
    np.testing.assert_allclose(losses[True][0], np.mean(alone), rtol=1e-5)


def test_the_task_trains_and_is_evaluated_saved_and_served(page, tmp_path):
    base = tiny_base()
    data = DataConfig(train="", prompt="{text}", target="{stars}", verbalizers={"1": "H", "2": "L", "5": "N"})
    config = resolve(ExperimentConfig(base=BaseConfig(path=""), data=data, method=spt_jax.DeepPrompts(head="rating")))
    assert (config.loss.over, config.method.classes) == ("vocabulary", 3)
    method, template = config.method, make_template(config)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    records = [{"text": record["text"], "stars": stars} for record, stars in zip(RECORDS, "125", strict=True)]
    data = spt_jax.make_evaluation_set(base, encoder, records)
    optimizer = optax.adam(0.1)
    state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
    step = spt_jax.make_train_step(base, method, optimizer, config.loss.objective(data.plan.choices))
    batch = spt_jax.place_batch(spt_jax.pack(data.examples, data.plan), base.mesh)
    untrained = method.materialize(jax.tree.map(jnp.array, state.params), base.model)
    metrics = spt_jax.evaluate(base, data, untrained).metrics
    assert metrics["absolute_error"] == pytest.approx(5 / 3)  # all classes are equally likely, so 1 is predicted
    for _ in range(30):
        state, _ = step(state, batch)
    virtual = method.materialize(state.params, base.model)
    trained = spt_jax.evaluate(base, data, virtual)
    assert trained.metrics["absolute_error"] == 0 and trained.metrics["loss"] < metrics["loss"] / 2
    spt_jax.save_prompt(tmp_path / "prompt", base, method, virtual, template)
    assert spt_jax.load_prompt(tmp_path / "prompt", base).template == template
    bank = spt_jax.PromptBank(base)
    bank.load("stars", tmp_path / "prompt")
    classifier = Classifier(bank)
    served = classifier.score(classifier.read("stars", [{"text": record["text"]} for record in records]))
    for own, prediction in zip(served, trained.predictions, strict=True):
        np.testing.assert_allclose(list(own.values()), prediction["log_probabilities"], atol=1e-4)
        assert sum(np.exp(list(own.values()))) == pytest.approx(1, rel=1e-5)


def test_the_kernel_array_is_read_split_and_multiplied(page):
    """A base of signs is the plain base with the kernels that the signs stand for, on one device and on four."""
    plain = tiny_base(num_key_value_heads=4)
    ids = jnp.asarray([[1, 40, 41, 42, 60, 9]])
    places = jnp.arange(6)[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places))

    @jax.jit
    def logits(model):
        return model.logits(model.run(model.embed(ids), stream)[0])

    def signs(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return jnp.where(leaf > 0, 1.0, -1.0) * jnp.abs(leaf).mean(axis=1, keepdims=True)

    params = jax.tree_util.tree_map_with_path(signs, plain.params)
    expected = logits(dataclasses.replace(plain.model, params=params))
    assert np.abs(expected - logits(plain.model)).max() > 0.1
    for axes in ({}, {"fsdp": 2, "tensor": 2}):
        mesh = spt_jax.make_mesh(spt_jax.MeshConfig(**axes))
        base = tiny_base(quantize="binary", mesh=mesh, num_key_value_heads=4)
        np.testing.assert_allclose(logits(base.model), expected, atol=1e-4)
