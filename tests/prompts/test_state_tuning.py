"""State tuning: only the states of recurrent layers before the first token are trained."""

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
from spt_jax.evaluation.attribution import position_count
from spt_jax.evaluation.inspection import describe_prompt, similarity_map
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import export_peft
from spt_jax.models.memory import State
from spt_jax.prompts import PrefixTuning, PromptTuning, StateTuning
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import load_prompt, named_leaves, read_prompt, save_prompt
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.step import init_state, train_step
from tests.examples import QUICK_COMPILE, VOCAB, random_examples
from tests.family import moved_params
from tests.layouts import Run, lay_out

IDS = np.asarray([11, 60, 250, 8, 75, 31], np.int32)
ARRAYS = {"prefix/linear/arrays/convolution", "prefix/linear/arrays/recurrent"}
TEMPLATE = Template(prompt="{text}", target="{label}")


@functools.cache
def base_of():
    return tiny_base("qwen3_5_text")


def moved(method: StateTuning, seed: int = 1):
    """A prompt away from its start."""
    return method.materialize(moved_params(method, base_of(), seed), base_of().model)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, ids, stream):
    prefix = None if virtual is None else encode_prefix(model, virtual, jnp.zeros(0, jnp.int32))
    hidden, _ = run_stream(model, virtual, ids, stream, prefix)
    return model.logits(hidden)


def row_logits(base, virtual, ids) -> np.ndarray:
    """Logits [T, V] of one row, in a program for 32 tokens."""
    _, stream = lay_out([Run(0, 0, ids)], 32)
    return np.asarray(logits_of(base.model, virtual, np.pad(ids, (0, 32 - len(ids)))[None], stream))[0, : len(ids)]


def test_the_states_after_tokens_are_those_tokens():
    """In a base without attention, whose other layers have no memory. Without the convolutions, something is lost."""
    base = tiny_base("qwen3_5_text", num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    lead = np.asarray([7, 90, 33, 200, 41], np.int32)
    rows = base.model.embed(jnp.asarray(lead))
    _, found = base.model.run(rows[None], lay_out([Run(0, 0, lead)], 5)[1], return_memory=True)
    whole = row_logits(base, None, np.concatenate([lead, IDS]))[5:]
    for convolutions in (True, False):
        method = StateTuning(convolutions=convolutions)
        params = method.init_params(jax.random.key(0), base)
        params["states"] = {
            group: {name: found[group].arrays[name][:, 0] / params["scale"][group][name] for name in arrays}
            for group, arrays in params["states"].items()
        }
        ours = row_logits(base, method.materialize(params, base.model), IDS)
        error = np.abs(ours - whole).max()
        assert error < 5e-5 if convolutions else error > 0.01


def test_a_prompt_that_is_not_trained_is_the_base():
    base, method = base_of(), StateTuning()
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    assert virtual.prefix_length == method.token_count == method.prefix_length == 0
    np.testing.assert_array_equal(row_logits(base, virtual, IDS), row_logits(base, None, IDS))
    noisy = StateTuning(noise=0.5).init_params(jax.random.key(0), base)
    for leaf in jax.tree.leaves(noisy["states"]):
        assert float(leaf.std()) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("convolutions", [True, False])
def test_training_with_the_recipe_lowers_the_loss(convolutions):
    base, method, steps = base_of(), StateTuning(convolutions=convolutions), 20
    examples = [
        dataclasses.replace(one, ids=one.ids[one.ids < VOCAB], predicted=one.predicted[one.ids < VOCAB])
        for one in random_examples("target", 6)
    ]
    batch = place_batch(pack(examples, plan_batches(examples, lead=1, batch_size=6, packing=True)), base.mesh)
    config = resolve_optimizer(OptimizerConfig(), base.config.family, method.recipe)
    optimizer = make_optimizer(config, steps)
    step = jax.jit(functools.partial(train_step, method, CrossEntropy(), optimizer), compiler_options=QUICK_COMPILE)
    state, losses = init_state(jax.random.key(0), base, method, optimizer), []
    for _ in range(steps):
        state, metrics = step(base.model, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - (0.4 if convolutions else 0.15), losses


def test_served_in_a_mixture_and_generated_together(tmp_path):
    """By the engine, and stacked with prompts that have positions, each answer is that of the whole row."""
    base, how = base_of(), SamplingConfig(max_new_tokens=6)
    bank, requests, prompts = PromptBank(base), [], {}
    for seed, method in enumerate([StateTuning(), StateTuning(), PromptTuning(length=3), PrefixTuning(length=4)]):
        name, template = f"{method.name}{seed}", TEMPLATE
        if method.token_count:
            template = Template(prompt="<soft>{text}", target="{label}", virtual_tokens=3)
        virtual = method.materialize(moved_params(method, base, seed), base.model)
        prompts[name] = virtual
        bank.add(name, load_prompt(save_prompt(tmp_path / name, base, method, virtual, template), base))
        for text in ("a question", "the world and"):
            requests.append(Request(bank.request_ids(name, {"text": text}), name, how))
    served = Engine(bank, slots=3).generate(requests)
    order = list(prompts)
    stacked, index = stack_prompts(list(prompts.values())), [order.index(request.prompt) for request in requests]
    together = generate(base, [request.ids for request in requests], stacked, how, prompt_index=index)
    answers = {}
    for request, ours, theirs in zip(requests, served, together, strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
        answers.setdefault(request.prompt, []).append(ours.log_probabilities)
        if request.prompt.startswith("state_tuning"):
            ids = np.append(request.ids, ours.ids).astype(np.int32)
            logits = row_logits(base, prompts[request.prompt], ids)[len(request.ids) - 1 : -1]
            assert logits.argmax(-1).tolist() == ours.ids
    assert answers["state_tuning0"] != answers["state_tuning1"]


def test_saved_described_and_not_exported(tmp_path):
    base, method = base_of(), StateTuning()
    virtual = moved(method)
    assert set(named_leaves(virtual)) == ARRAYS
    folder = save_prompt(tmp_path / "ours", base, method, virtual, TEMPLATE)
    for saved in (load_prompt(folder, base), read_prompt(folder)):
        assert saved.method == method
        jax.tree.map(np.testing.assert_array_equal, saved.virtual, virtual)
    assert "state_tuning: initial states of 2 recurrent layers" in describe_prompt(read_prompt(folder))
    with pytest.raises(ConfigError, match="this state_tuning prompt has states of recurrent layers"):
        export_peft(tmp_path / "peft", load_prompt(folder, base), base)
    assert not (tmp_path / "peft").exists()
    np.testing.assert_allclose(similarity_map([virtual, virtual]), np.ones((2, 2)), rtol=1e-6)
    again = StateTuning(path=str(folder))
    started = again.materialize(again.init_params(jax.random.key(2), base), base.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), started, virtual)
    with pytest.raises(ConfigError, match=r"set method\.convolutions to True to train them"):
        StateTuning(path=str(folder), convolutions=False).init_params(jax.random.key(0), base)


def test_starts_from_the_states_of_a_prefix(tmp_path):
    base = base_of()
    for states in (True, False):
        method = PrefixTuning(length=3, states=states)
        virtual = method.materialize(moved_params(method, base), base.model)
        again = StateTuning(path=str(save_prompt(tmp_path / str(states), base, method, virtual, TEMPLATE)))
        if not states:
            with pytest.raises(ConfigError, match="a prompt without states of recurrent layers"):
                again.init_params(jax.random.key(0), base)
            continue
        started = again.materialize(again.init_params(jax.random.key(2), base), base.model).prefix.memory
        theirs = {name: own for name, own in virtual.prefix.memory.items() if isinstance(own, State)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), started, theirs)


def test_bases_without_recurrent_layers_and_positions_to_remove():
    with pytest.raises(ConfigError, match="state_tuning needs recurrent layers, and tiny-llama has none"):
        init_state(jax.random.key(0), tiny_base(), StateTuning(), optax.sgd(0.1))
    with pytest.raises(ConfigError, match="no positions to remove"):
        position_count(moved(StateTuning()))
