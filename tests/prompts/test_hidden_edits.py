"""Edits of hidden states: what they are, where they act, and what refuses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.bases.base import load_base
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.inference.forward import run_stream
from spt_jax.interop.arrays import export_npy
from spt_jax.interop.card import model_card
from spt_jax.interop.peft_export import export_peft
from spt_jax.models.attention import Stream
from spt_jax.models.edits import HiddenEdits, edited
from spt_jax.prompts import RepresentationFinetuning, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from tests.examples import QUICK_COMPILE
from tests.golden.cases import E2B

METHOD = RepresentationFinetuning(rank=2)
IDS = np.asarray([[1, 40, 99, 17, 250, 31, 8]], np.int32)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def hidden_of(model, virtual, ids):
    positions = jnp.arange(ids.shape[1])[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    return run_stream(model, virtual, ids, stream)[0]


def of_layers(base, *layers: int) -> VirtualPrompt:
    """Edits of noise after some layers, and of zeros after the others."""
    spec = METHOD.spec(base.layout).edits
    chosen = np.isin(np.arange(base.layout.layer_count), layers)
    arrays = [0.5 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(jax.tree.leaves(spec))]
    return VirtualPrompt(edits=HiddenEdits(*(own * chosen.reshape(-1, *[1] * (own.ndim - 1)) for own in arrays)))


def test_an_edit_is_low_rank_and_proportional_to_the_hidden_state():
    random = np.random.default_rng(0)
    x, down, bias, up = (random.standard_normal(size).astype("f") for size in ((2, 3, 6), (6, 2), (2,), (2, 6)))
    edits = HiddenEdits(*map(jnp.asarray, (down, bias, up)))
    size = np.sqrt((x**2).mean(-1, keepdims=True))
    expected = x + (x @ down + size * bias) @ up
    found = edited(jnp.asarray(x), edits)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(edited(1000 * jnp.asarray(x), edits), 1000 * found, rtol=1e-4, atol=1e-3)
    by_row = jax.tree.map(lambda a: jnp.stack([a, 0 * a]), edits)
    of_rows = np.asarray(edited(jnp.asarray(x), by_row))
    np.testing.assert_allclose(of_rows[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(of_rows[1], x[1])
    slope = jax.grad(lambda x: edited(x, edits).sum())(jnp.zeros((1, 1, 6)))
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("family", ["gemma4_text", "falcon_h1"])
def test_edits_of_zeros_are_the_bare_base_and_those_of_every_layer_have_an_effect(family):
    base = tiny_base(family, **(E2B if family == "gemma4_text" else {}))
    start = METHOD.materialize(METHOD.init_params(jax.random.key(0), base), base.model)
    bare = np.asarray(hidden_of(base.model, None, IDS))
    np.testing.assert_array_equal(hidden_of(base.model, start, IDS), bare)
    for layer in range(base.layout.layer_count):
        assert np.abs(hidden_of(base.model, of_layers(base, layer), IDS) - bare).max() > 0.01, layer


def test_options_and_bases_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"method\.rank is 0; it must be at least 1"):
        RepresentationFinetuning(rank=0)
    base = tiny_base()
    wide = dataclasses.replace(METHOD, rank=base.layout.layer_width + 1)
    with pytest.raises(ConfigError, match=rf"method\.rank is {wide.rank}; the layers of .* have width {wide.rank - 1}"):
        wide.check_base(base)
    both = load_base(str(write_tiny_checkpoint(tmp_path, "t5")), dtype="float32")
    with pytest.raises(ConfigError, match="reft does not support encoder-decoders"):
        METHOD.check_base(both)
    with pytest.raises(ConfigError, match="an encoder-decoder has no edits of hidden states"):
        hidden_of(both.model, of_layers(base, 0), IDS)


def test_what_has_no_such_part_refuses_it(tmp_path):
    base = tiny_base()
    template = Template(prompt="{text}\n", target="{answer}")
    saved = load_prompt(save_prompt(tmp_path / "prompt", base, METHOD, of_layers(base, 1), template), base)
    with pytest.raises(ConfigError, match="this reft prompt edits hidden states, which PEFT's prompts do not do"):
        export_peft(tmp_path / "peft", saved, base)
    with pytest.raises(ConfigError, match="does not consist only of token rows"):
        export_npy(tmp_path / "rows.npy", saved)
    assert "PEFT has no soft prompts of this kind" in model_card("me/prompt", saved, on_hub=False)
    assert "reft: edits of rank 2 of the hidden states after 3 layers" in describe_prompt(saved)
