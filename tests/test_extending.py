"""The code in docs/extending.md adds a family and a method, which then work like all others."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import spt_jax
from spt_jax.bases.families import FAMILIES
from spt_jax.inference.forward import output_logits
from spt_jax.prompts import METHODS
from spt_jax.testing import write_tiny_checkpoint
from tests.jobs import ROOT

RECORDS = [{"text": text, "label": label} for text, label in (("yes", "H"), ("no", "L"), ("maybe so", "N"))]


@pytest.fixture(scope="module")
def page():
    """The names that the page defines. What it registers is removed again."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    names = {"__name__": "page"}
    families, methods = dict(FAMILIES), dict(METHODS)
    for block in blocks:
        exec(block, names)
    yield names
    for registry, before in ((FAMILIES, families), (METHODS, methods)):
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
