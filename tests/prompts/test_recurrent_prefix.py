"""Prefix tuning of a base with recurrent layers: keys and values of attention, and states before the first token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import export_peft
from spt_jax.models.memory import State
from spt_jax.prompts import PrefixTuning
from spt_jax.prompts.initializers import Initializer
from spt_jax.prompts.storage import load_prompt, named_leaves, read_prompt, save_prompt
from spt_jax.testing import EOS_ID, tiny_base
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import QUICK_COMPILE, VOCAB, random_examples
from tests.layouts import Run, lay_out

P = 5
STATES = {"prefix/linear/arrays/convolution", "prefix/linear/arrays/recurrent"}


TWO = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
OPTIONS = {"qwen3_5_text": TWO, "granitemoehybrid": TWO, "falcon_h1": {}}
EVERY_FAMILY = pytest.mark.parametrize("family", OPTIONS)


@functools.cache
def base_of(family: str = "qwen3_5_text"):
    return tiny_base(family, **OPTIONS[family])


def method_of(**options) -> PrefixTuning:
    return PrefixTuning(length=P, init=Initializer(name="vocabulary"), **options)


def moved(method: PrefixTuning, family: str = "qwen3_5_text"):
    """Parameters away from their start, and what they are materialized to."""
    params = method.init_params(jax.random.key(0), base_of(family))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = structure.unflatten([a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    return method.materialize(params, base_of(family).model)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, ids, stream):
    prefix = None if virtual is None else encode_prefix(model, virtual, jnp.zeros(0, jnp.int32))
    hidden, _ = run_stream(model, virtual, ids, stream, prefix)
    return model.logits(hidden)


def row_logits(virtual, ids, first: int = 0, family: str = "qwen3_5_text") -> np.ndarray:
    """Logits [T, V] of one row whose first token has the position `first`, in a program for 32 tokens."""
    _, stream = lay_out([Run(0, 0, ids)], 32)
    stream = dataclasses.replace(stream, positions=stream.positions + first)
    padded = np.pad(ids, (0, 32 - len(ids)))[None]
    return np.asarray(logits_of(base_of(family).model, virtual, padded, stream))[0, : len(ids)]


@pytest.mark.parametrize("reparameterization", ["flat", "mlp"])
@pytest.mark.parametrize("states", [False, True])
def test_training_lowers_the_loss(states, reparameterization):
    base, method = base_of(), method_of(states=states, reparameterization=reparameterization, hidden=8)
    examples = [
        dataclasses.replace(one, ids=one.ids[one.ids < VOCAB], predicted=one.predicted[one.ids < VOCAB])
        for one in random_examples("target", 6)
    ]
    batch = place_batch(pack(examples, plan_batches(examples, lead=0, batch_size=6, packing=True)), base.mesh)
    optimizer = optax.adam(0.1)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def step(model, params, state):
        loss, gradient, _ = loss_and_gradient(method, CrossEntropy(), model, params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    start = params = method.init_params(jax.random.key(0), base)
    state, losses = optimizer.init(params), []
    for _ in range(6):
        params, state, loss = step(base.model, params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, losses
    assert ("states" in params) == states
    if states:
        changes = jax.tree.map(lambda new, old: float(jnp.abs(new - old).min()), params["states"], start["states"])
        assert min(jax.tree.leaves(changes)) > 0  # every number of both arrays


@EVERY_FAMILY
def test_a_prefix_of_the_states_and_keys_of_tokens_is_those_tokens(family):
    """Without the states, the recurrent layers do not know of the tokens."""
    base = base_of(family)
    lead, ids = np.asarray([7, 90, 33, 200, 41], np.int32), np.asarray([11, 60, 250, 8, 75, 31], np.int32)
    rows = base.model.embed(jnp.asarray(lead))
    _, found = base.model.run(rows[None], lay_out([Run(0, 0, lead)], P)[1], return_memory=True)
    states = {
        name: jax.tree.map(lambda a: a[:, 0], own.arrays) for name, own in found.items() if isinstance(own, State)
    }
    method = PrefixTuning(length=P, init=Initializer(name="array", rows=np.asarray(rows)), states=True)
    params = method.init_params(jax.random.key(0), base)
    without = method.materialize(params, base.model)
    params["states"] = jax.tree.map(lambda a: a / params["scale"], states)
    whole = row_logits(None, np.concatenate([lead, ids]), family=family)[P:]
    found = row_logits(method.materialize(params, base.model), ids, P, family)
    np.testing.assert_allclose(found, whole, atol=5e-5)
    assert np.abs(row_logits(without, ids, P, family) - whole).max() > 0.1


@EVERY_FAMILY
@pytest.mark.parametrize("states", [False, True])
def test_generation_from_the_cache(states, family):
    base, virtual = base_of(family), moved(method_of(states=states), family)
    prompts = [one.ids[one.ids < VOCAB] for one in random_examples("target", 3)]
    answers = generate(base, prompts, virtual, SamplingConfig(max_new_tokens=8))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt.tolist()
        for token, log_probability in zip(answer.ids, answer.log_probabilities, strict=True):
            scores = row_logits(virtual, np.asarray(ids, np.int32), P, family)[-1]
            assert token == scores.argmax()
            assert log_probability == pytest.approx(scores.max() - np.logaddexp.reduce(scores), abs=1e-4)
            ids.append(token)
        assert len(answer.ids) == 8 or ids[-1] == EOS_ID


@pytest.mark.parametrize("states", [False, True])
def test_saved_loaded_and_not_exported(states, tmp_path):
    base, method = base_of(), method_of(states=states)
    virtual = moved(method)
    names = set(named_leaves(virtual))
    assert names == {"prefix/keys", "prefix/values"} | (STATES if states else set())
    folder = save_prompt(tmp_path / "ours", base, method, virtual, Template(prompt="{text}", target="{label}"))
    for saved in (load_prompt(folder, base), read_prompt(folder)):
        assert saved.method.states == states
        jax.tree.map(np.testing.assert_array_equal, saved.virtual, virtual)
    same = "PEFT has prefixes only for models whose layers all have the same attention"
    with pytest.raises(ConfigError, match="prompt has states of recurrent layers" if states else same):
        export_peft(tmp_path / "peft", load_prompt(folder, base), base)
    assert not (tmp_path / "peft").exists()
    if states:
        again = PrefixTuning(length=P, init=Initializer(name="prompt", path=str(folder)), states=True)
        started = again.materialize(again.init_params(jax.random.key(2), base), base.model)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), started, virtual)


def test_states_of_a_base_without_recurrent_layers():
    with pytest.raises(ConfigError, match=r"no layer of .* is recurrent; set it to False"):
        method_of(states=True).init_params(jax.random.key(0), tiny_base())
