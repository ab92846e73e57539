"""Prompts of a base whose embeddings are narrower than its layers, as OPT-350m's are."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.prompts import METHODS
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import tiny_base
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE
from tests.family import batch_of, method_of, moved_params, objective_of

METHODS_OF_TOKENS = sorted(set(METHODS) - {"llama_adapter", "state_tuning"})  # which have no rows of that width


@functools.cache
def base():
    return tiny_base("opt", word_embed_proj_dim=24, do_layer_norm_before=False)


@functools.partial(jax.jit, static_argnames=("method", "objective"), compiler_options=QUICK_COMPILE)
def jitted(method, objective, model, params, batch):
    return loss_and_gradient(method, objective, model, params, batch)


@pytest.mark.parametrize("name", METHODS_OF_TOKENS)
def test_prompts_have_the_width_of_embeddings(name):
    method = method_of(name)
    params = moved_params(method, base())
    virtual, spec = method.materialize(params, base().model), method.spec(base().layout)
    assert jax.tree.map(jnp.shape, virtual) == jax.tree.map(jnp.shape, spec)
    losses = []
    for shared in (True, False):
        batch = batch_of(method, base(), shared=shared, packing=shared)
        losses.append(jitted(method, objective_of(method, base()), base().model, params, batch)[0])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_llama_adapter_is_refused():
    method = method_of("llama_adapter")
    with pytest.raises(ConfigError, match="llama_adapter needs embeddings as wide as the layers"):
        method.init_params(jax.random.key(0), base())


def test_the_width_of_a_saved_prompt_is_bounded(tmp_path):
    method = method_of("prompt_tuning")
    virtual = method.materialize(moved_params(method, base()), base().model)
    template = Template(prompt="<soft>{a}", target="{b}", virtual_tokens=method.token_count)
    directory = save_prompt(tmp_path, base(), method, virtual, template)
    np.testing.assert_array_equal(load_prompt(directory, base()).virtual.tokens, virtual.tokens)
    info = json.loads((directory / "prompt.json").read_text())
    info["base"]["fingerprint"]["config"]["embedding_width"] = 2**40
    (directory / "prompt.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="embedding_width is 1099511627776; it must be at most"):
        load_prompt(directory, base())
