"""Prompts that sliding windows do not hide: `pin_prefix` of the methods with positions.

The reference of a base whose layers all have a window of 7 is the same base without windows, which is shown one mask:
the last 7 tokens, and all positions of the prompt.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.attribution import attention_received
from spt_jax.inference.forward import encode_prefix, output_logits, run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import export_peft
from spt_jax.models import attention
from spt_jax.prompts import METHODS, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import init_state, loss_and_gradient
from tests.examples import QUICK_COMPILE, VIRTUAL, VOCAB, random_examples
from tests.family import OPTIONS
from tests.layouts import Run, lay_out

WINDOW = 7
TEXT = np.asarray([31, 90, 33, 200, 41, 11, 60, 250, 8, 75, 31, 77, 101, 5, 63, 210, 19, 44], np.int32)
SOFT = VOCAB + np.arange(3, dtype=np.int32)
PINNING = [name for name, kind in METHODS.items() if hasattr(kind, "pin_prefix")]


@functools.cache
def base_of(family: str = "mistral", **axes: int):
    """All layers of Mistral have a window; of gpt-oss's, every second one, and those of Gemma 2 have soft caps."""
    return tiny_base(family, mesh=make_mesh(MeshConfig(**axes)))


@functools.cache
def without_windows():
    """The Mistral without windows, with the same weights."""
    base = base_of()
    config = dataclasses.replace(base.config, window=0, window_layers=())
    return dataclasses.replace(base.model, module=base.model.module.clone(config=config))


def prompt_of(kind: str, pinned: bool, seed: int = 0, family: str = "mistral") -> tuple[spt_jax.Method, VirtualPrompt]:
    """A prompt far from its start, so that it changes every answer."""
    method = (PromptTuning if kind == "tokens" else PrefixTuning)(length=3, pin_prefix=pinned)
    base = base_of(family)
    params = jax.tree.map(lambda a: a + 0.3, method.init_params(jax.random.key(seed), base))
    return method, method.materialize(params, base.model)


def ids_of(kind: str, lead: int = 0) -> np.ndarray:
    """BOS, as many other tokens as `lead`, the virtual tokens of a prompt that has some, and text."""
    soft = SOFT if kind == "tokens" else SOFT[:0]
    return np.concatenate([[1], TEXT[:lead], soft, TEXT[lead:]]).astype(np.int32)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE, static_argnames="lead")
def row_logits(model, virtual, ids, lead: int = 0):
    """Logits [T - lead, V] of a row, after `lead` leading ids."""
    prefix = encode_prefix(model, virtual, ids[:lead])
    own = ids[None, lead:]
    places = virtual.first_position + lead + jnp.arange(own.shape[1])[None]
    stream = attention.Stream(places, jnp.ones_like(own), jnp.zeros_like(own))
    hidden, _ = run_stream(model, virtual, own, stream, prefix)
    return model.logits(hidden)[0]


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch):
    """Makes a base without windows hide what is far behind, except the positions that `pins` lists."""

    def reference(virtual: VirtualPrompt, ids: np.ndarray, pins: np.ndarray) -> np.ndarray:
        def visible(queries, key_positions, key_segments):
            before = key_positions[:, None, :] <= queries.positions[:, :, None]
            near = queries.positions[:, :, None] - key_positions[:, None, :] < WINDOW
            return before & (near | jnp.isin(key_positions, pins)[:, None, :])

        monkeypatch.setattr("spt_jax.models.decoder.visible", visible)
        whole = row_logits.__wrapped__(without_windows(), dataclasses.replace(virtual, pinned=False), ids)
        monkeypatch.undo()
        return np.asarray(whole)

    return reference


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_pinned_positions_stay_visible_and_nothing_else_does(kind, masked):
    """However the prompt is split into leading ids and rows, and packed or not."""
    _, virtual = prompt_of(kind, True)
    ids = ids_of(kind, 2)
    pins = np.arange(3) + (3 if kind == "tokens" else 0)
    expected = masked(virtual, ids, pins)
    np.testing.assert_allclose(row_logits(base_of().model, virtual, ids), expected, atol=2e-5)
    for lead in (6, 15):
        ours = row_logits(base_of().model, virtual, ids, lead)
        np.testing.assert_allclose(ours, expected[lead:], atol=2e-5, err_msg=str(lead))
    plain = row_logits(base_of().model, dataclasses.replace(virtual, pinned=False), ids)
    np.testing.assert_allclose(plain, masked(virtual, ids, np.zeros(0, int)), atol=2e-5)
    assert np.abs(plain - expected)[-4:].max() > 0.01
