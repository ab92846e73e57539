"""What must hold for every method, whatever it trains: one test per rule, over all of METHODS.

The reference of a method is itself at its plainest: one device, every sequence in a row of its own, no shared prefix,
one microbatch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import METHODS
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from spt_jax.testing import tiny_base
from spt_jax.training.checkpoints import Checkpoints
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step
from tests.examples import QUICK_COMPILE, random_examples
from tests.family import BASES, batch_of, fit_ids, has_head, method_of, moved_params, objective_of, task_of, tasks_of


def base_of(name: str, remat: str = "none", **axes: int):
    """The base of a method; that of most methods is the same."""
    return cached_base(name if name in BASES else "", remat, **axes)


@functools.cache
def cached_base(name: str, remat: str, **axes: int):
    options = {"num_key_value_heads": 4, **BASES.get(name, {})}
    base = tiny_base(**options, mesh=make_mesh(MeshConfig(**axes)))
    return dataclasses.replace(base, model=base.model.with_options(remat=remat))


def params_of(name: str, seed: int = 1):
    return moved_params(method_of(name), base_of(name), seed)


@functools.partial(jax.jit, static_argnames=("method", "objective", "microbatches"), compiler_options=QUICK_COMPILE)
def jitted(method, objective, model, params, batch, microbatches=1):
    return loss_and_gradient(method, objective, model, params, batch, microbatches)


@functools.cache
def plain(name: str):
    method, base = method_of(name), base_of(name)
    batch = batch_of(method, base, shared=False, packing=False)
    return jitted(method, objective_of(method, base), base.model, params_of(name), batch)


@pytest.mark.parametrize("name", METHODS)
def test_sharing_packing_microbatches_remat_and_mesh_change_nothing(name):
    loss, gradient, _ = plain(name)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-4, "a gradient of nothing agrees with anything"
    method, base = method_of(name), base_of(name, remat="full", data=2, tensor=2)
    batch = batch_of(method, base, shared=True, packing=True, microbatches=2)
    params = jax.device_put(params_of(name), replicated(base.mesh))
    ours, slope, _ = jitted(method, objective_of(method, base), base.model, params, batch, 2)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), slope, gradient)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, batch):
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    return output_logits(model, virtual, prefix, batch.rows)


@pytest.mark.parametrize("name", METHODS)
def test_generation_is_the_teacher_forced_argmax(name):
    method, base = method_of(name), base_of(name)
    virtual = method.materialize(params_of(name), base.model)
    prompts = [np.append(fit_ids(method, e.ids), 30).astype(np.int32) for e in random_examples("choices", 3)]
    if has_head(method, base):
        with pytest.raises(ConfigError, match="cannot generate text"):
            generate(base, prompts, virtual)
        return
    index = [task_of(method, i) for i in range(len(prompts))] if tasks_of(method) else None
    answers = generate(base, prompts, virtual, SamplingConfig(max_new_tokens=6), prompt_index=index)
    examples = [
        Example(
            ids := np.append(p, a.ids).astype(np.int32), np.arange(len(ids)) >= len(p), (), 0, i, task_of(method, i)
        )
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    examples = [e.reading(causal=True) for e in examples] if method.per_input else examples
    plan = plan_batches(examples, lead=[0] * tasks_of(method) or 0, batch_size=3, packing=False)
    batch = pack(examples, plan)
    logits = np.asarray(logits_of(base.model, virtual, batch))
    for number, row, weights in zip(batch.rows.examples[:, 0], logits, batch.rows.target_weights, strict=True):
        assert answers[number].ids == row.argmax(-1)[weights > 0].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_and_two_more_after_a_restart_are_four(name, tmp_path):
    method, base = method_of(name), base_of(name)
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    batch = batch_of(method, base, shared=True, packing=True)
    step = make_train_step(base, method, optimizer, objective_of(method, base))
    state = init_state(jax.random.key(0), base, method, optimizer)
    first = jax.tree.map(np.array, state.params)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for i in range(4):
            state, _ = step(state, batch)
            if i == 1:
                checkpoints.save(state, {}, {})
        restored, _, _ = checkpoints.restore(None, init_state(jax.random.key(9), base, method, optimizer))
    for _ in range(2):
        restored, _ = step(restored, batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), restored.params, state.params)
    trainable = method.trainable(state.params)
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, np.asarray(new)), first, state.params)
    assert jax.tree.leaves(changed) == jax.tree.leaves(trainable)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_the_whole_prompt(name, tmp_path):
    trained, base, params = method_of(name), base_of(name), params_of(name)
    whole = trained.materialize(params, base.model)
    for part, (method, virtual) in trained.artifacts(whole, params).items():
        prompt = "<soft>{a}" if method.token_count else "{a}"
        template = Template(prompt=prompt, target="{b}", virtual_tokens=method.token_count, per_input=method.per_input)
        save_prompt(tmp_path / "prompt" / part, base, method, virtual, template)
        saved = load_prompt(tmp_path / "prompt" / part, base)
        assert saved.method == method
        assert jax.tree.structure(saved.virtual) == jax.tree.structure(virtual)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), saved.virtual, virtual)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), whole)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trained.spec(base.layout)) == shapes
    if tasks_of(trained):
        for task, rows in zip(trained.tasks, whole.tokens, strict=True):
            np.testing.assert_array_equal(trained.artifacts(whole, params)[task][1].tokens, rows)
