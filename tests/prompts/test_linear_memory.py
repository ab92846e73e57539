"""Prefix-Tuning+: what its maps are, where they act, and what refuses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.attribution import attention_received
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.inference.forward import run_stream
from spt_jax.interop.arrays import export_npy
from spt_jax.interop.card import model_card
from spt_jax.interop.peft_export import export_peft
from spt_jax.models.attention import LinearMemory, Stream, linear_term
from spt_jax.prompts import PrefixTuningPlus, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.prompts.transfer import average
from spt_jax.testing import tiny_base
from tests.examples import QUICK_COMPILE

METHOD = PrefixTuningPlus()
IDS = np.asarray([[1, 40, 99, 17, 250, 31, 8]], np.int32)


@functools.cache
def base_of(family: str):
    return tiny_base(family)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def hidden_of(model, virtual, ids):
    positions = jnp.arange(ids.shape[1])[None]
    return run_stream(model, virtual, ids, Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions)))[0]


def moved(base, group: str | None = None) -> VirtualPrompt:
    """Maps of noise for one group of layers, or for all."""
    spec = METHOD.spec(base.layout).linear.maps
    noise = {
        name: (group in (None, name)) * jax.random.normal(jax.random.key(i), own.shape)
        for i, (name, own) in enumerate(spec.items())
    }
    return VirtualPrompt(linear=LinearMemory(noise))


def test_the_term_is_elu_of_the_query_times_the_map_of_its_head():
    random = np.random.default_rng(0)
    queries, maps = random.standard_normal((2, 3, 6, 4)).astype("f"), random.standard_normal((2, 4, 5)).astype("f")
    features = np.where(queries > 0, queries, np.exp(queries) - 1)
    expected = np.stack([features[:, :, head] @ maps[head // 3] for head in range(6)], axis=2)
    np.testing.assert_allclose(linear_term(jnp.asarray(queries), jnp.asarray(maps)), expected, atol=1e-5)
    by_row = jnp.stack([jnp.asarray(maps), jnp.zeros(maps.shape)])
    of_rows = np.asarray(linear_term(jnp.asarray(queries), by_row))
    np.testing.assert_allclose(of_rows[0], expected[0], atol=1e-5)
    assert not of_rows[1].any()


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "deepseek_v3"])
def test_maps_of_zeros_are_the_bare_base_and_every_group_has_an_effect(family):
    base = base_of(family)
    start = METHOD.materialize(METHOD.init_params(jax.random.key(0), base), base.model)
    bare = np.asarray(hidden_of(base.model, None, IDS))
    np.testing.assert_array_equal(hidden_of(base.model, start, IDS), bare)
    for group in METHOD.spec(base.layout).linear.maps:
        assert np.abs(hidden_of(base.model, moved(base, group), IDS) - bare).max() > 0.01, group


def test_a_base_without_attention_is_refused():
    base = tiny_base("qwen3_5_text", layer_types=["linear_attention"] * 2, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="prefix_tuning_plus needs layers with attention"):
        METHOD.init_params(jax.random.key(0), base)


def test_what_has_no_such_part_refuses_it(tmp_path):
    base = base_of("llama")
    template = Template(prompt="{text}\n", target="{answer}")
    folder = save_prompt(tmp_path / "prompt", base, METHOD, moved(base), template)
    saved = load_prompt(folder, base)
    with pytest.raises(ConfigError, match="this prefix_tuning_plus prompt has maps outside the softmax"):
        export_peft(tmp_path / "peft", saved, base)
    with pytest.raises(ConfigError, match="does not consist only of token rows"):
        export_npy(tmp_path / "rows.npy", saved)
    with pytest.raises(ConfigError, match="only token rows"):
        average([saved.virtual])
    with pytest.raises(ConfigError, match="no positions"):
        attention_received(base, [], saved.virtual)
    assert "PEFT has no soft prompts of this kind" in model_card("me/prompt", saved, on_hub=False)
    assert "prefix_tuning_plus: maps of the queries of 3 layers, norm" in describe_prompt(saved)
