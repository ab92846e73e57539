"""Runs of encoders and encoder-decoders: resumed, on several devices, and in populations."""

import functools
import json

import jax
import numpy as np
import pytest

import train
from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.evaluation.evaluate import make_evaluation_set
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.runtime.mesh_config import MeshConfig
from spt_jax.runtime.sharding import make_mesh
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.population import (
    Member,
    aligned_plans,
    common_method,
    init_members,
    make_population_step,
    own_params,
    stack_batches,
)
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step
from tests.jobs import ROOT, arrays, losses, stopped_at_batch

TEXTS = [("the question", "a"), ("who", "b"), ("and what of it", "a"), ("is", "b"), ("a b c d e f g", "b")]
RECORDS = [{"text": text, "label": label} for text, label in TEXTS]
CLASSES = {"a": "H", "b": "L"}
PROMPTS = {"t5": "<soft>{text}", "bert": "<soft>{text}<mask>"}


@functools.cache
def base_of(family, **axes):
    """A base with a layer on each side."""
    layers = {"num_layers": 1, "num_decoder_layers": 1} if family == "t5" else {"num_hidden_layers": 1}
    return tiny_base(family, mesh=make_mesh(MeshConfig(**axes)), **layers)


@pytest.mark.parametrize("family", ["t5"])
def test_a_run_is_resumed_bit_for_bit(family, tmp_path):
    """Stopped by a signal at its third batch, and continued."""
    base = write_tiny_checkpoint(tmp_path / "base", family)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    line = [str(ROOT / "configs" / "local_files.py"), "--base.path", str(base), "--data.train", str(data)]
    line += ["--method.length", "2", "--data.prompt", PROMPTS[family], "--data.target", "{label}"]
    line += ["--data.verbalizers", "a=H", "b=L", "--train.steps", "4", "--train.batch-size", "4"]
    line += ["--train.checkpoint-every", "2", "--data.validation", "None", "--data.test", "None"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main([*line, "--workdir", str(whole)]) == 0
    with stopped_at_batch(3):
        assert train.main([*line, "--workdir", str(stopped)]) == 143
    assert not (stopped / "results.json").exists()
    assert train.main([*line, "--workdir", str(stopped), "--resume"]) == 0
    assert losses(stopped) == losses(whole)
    assert arrays(stopped).tobytes() == arrays(whole).tobytes()


@pytest.mark.parametrize("family", list(PROMPTS))
def test_loss_and_gradient_on_two_devices(family):
    """Rows on both, and layers split over both, for a prefix of every attention site."""
    objective, method, found = VerbalizerCrossEntropy(choices=2), PrefixTuning(length=2), []
    template = Template(prompt=PROMPTS[family].replace("<soft>", ""), target="{label}", verbalizers=CLASSES)
    for axes in ({}, {"data": 2}, {"tensor": 2}):
        base = base_of(family, **axes)
        params = method.init_params(jax.random.key(0), base)
        examples = encoder_for(base, template, taken=2).encode_all(RECORDS)
        plan = plan_batches(examples, lead=0, batch_size=len(examples), **multiples(base.mesh))
        batch = place_batch(pack(examples, plan), base.mesh)
        with jax.set_mesh(base.mesh):
            step = jax.jit(loss_and_gradient, static_argnums=(0, 1))
            loss, gradient, _ = step(method, objective, base.model, params, batch)
        found.append(jax.tree.map(np.asarray, (loss, gradient)))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[0], other)


def test_evaluation_rows_are_those_of_training():
    """Examples of nearly equal length have a row each, on bases that share no leading tokens."""
    template = Template(prompt="{text}", target="{label}", verbalizers=CLASSES)
    equal = [{"text": "the question", "label": "a"}] * 6
    for family, records, shared in (("t5", equal, False), ("t5", RECORDS, True), ("llama", equal, True)):
        base = base_of(family)
        plan = make_evaluation_set(base, encoder_for(base, template), records).plan
        assert (plan.examples > 1) == shared


@pytest.mark.parametrize(("family", "head"), [("t5", "language_model"), ("bert", "classification")])
def test_members_of_a_population_train_as_alone(family, head):
    """Prompts of unequal length, whose examples fill rows differently; a head is trained with each."""
    base, records = base_of(family), RECORDS
    options = {} if head == "language_model" else {"head": head, "classes": 2}
    config, steps = resolve_optimizer(OptimizerConfig(learning_rate=0.05), family), 3
    members = []
    for length in (2, 9):
        verbalizers = {"a": "H", "b": "long"}
        template = Template(
            prompt="<soft>{text}", target="{label}", virtual_tokens=length, verbalizers=verbalizers, head=head
        )
        examples = encoder_for(base, template).encode_all(records)
        plan = plan_batches(examples, lead=0, batch_size=len(examples))
        members.append(Member(PromptTuning(length=length, **options), examples, plan, length, 0.05))
    objective = CrossEntropy() if options else VerbalizerCrossEntropy(choices=2)
    plans = aligned_plans(members)
    batches = [pack(member.examples, plan) for member, plan in zip(members, plans, strict=True)]
    together = make_population_step(base, common_method(members), config, steps, objective)
    states, rates = init_members(base, members, config, steps), np.asarray([0.05, 0.05], np.float32)
    for _ in range(steps):
        states, _ = together(states, rates, place_batch(stack_batches(batches), base.mesh, stacked=True))
    for member, state, batch in zip(members, states, batches, strict=True):
        optimizer = make_optimizer(config, steps)
        step = make_train_step(base, member.method, optimizer, objective)
        alone = init_state(jax.random.key(member.seed), base, member.method, optimizer)
        for _ in range(steps):
            alone, _ = step(alone, place_batch(batch, base.mesh))
        own = own_params(state.params, member.method)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own, dict(alone.params))
        assert ("head" in own) == bool(options)
