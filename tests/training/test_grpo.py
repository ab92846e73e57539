"""GRPO on packed rows: every layout has the same loss; rollouts are functions of seed, number and prompt."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.bases.base import load_base
from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.rewards import Judge, Reward
from spt_jax.inference.generation import programs
from spt_jax.prompts import PromptTuning
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.objectives import Grpo
from spt_jax.training.objectives.grpo import group_extra
from spt_jax.training.rollouts import Questions, RolloutBatches, check_samples_alone
from spt_jax.training.step import measured_gradient
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL
from tests.groups import GROUP, random_groups

LONGEST = 4
OBJECTIVE = Grpo(group_size=GROUP, max_new_tokens=LONGEST, beta=0.1, length_normalization="token")


@functools.cache
def base_of(**axes: int):
    return tiny_base("llama", mesh=make_mesh(MeshConfig(**axes)))


def tokens(base, seed=3):
    values = np.random.default_rng(seed).normal(0, 0.3, (VIRTUAL, base.layout.width))
    return {"tokens": jnp.asarray(values, jnp.float32)}


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK_COMPILE)
def gradient_of(objective, model, params, batch, microbatches):
    return measured_gradient(PromptTuning(length=VIRTUAL), objective, model, params, batch, microbatches)


def prepared_groups(count):
    """Groups with random rewards, log-probabilities and, for one answer, no reward."""
    random, groups = np.random.default_rng(5), random_groups(count, LONGEST)
    rewards = random.normal(size=(count, GROUP))
    rewards[1, 2] = np.nan
    advantages, weights = OBJECTIVE.advantages(rewards)
    found = []
    for number, group in enumerate(groups):
        lengths = np.asarray([len(answer) for answer in group.choices])
        old, reference = random.normal(-5.7, 0.3, (2, GROUP, LONGEST))
        extra = group_extra(advantages[number], weights[number], lengths, old, reference)
        found.append(Example(group.ids, group.predicted, group.choices, 0, number, extra=extra))
    return found


@functools.cache
def layout_of(packing: bool = True, lead: int = len(HEAD), microbatches: int = 1, axes: tuple = ()):
    """Loss, gradient, weight and metrics of six groups."""
    base, groups = base_of(**dict(axes)), prepared_groups(6)
    limits = multiples(base.mesh, microbatches)
    batch = pack(groups, plan_batches(groups, batch_size=6, lead=lead, packing=packing, **limits))
    return jax.device_get(gradient_of(OBJECTIVE, base.model, tokens(base), place_batch(batch, base.mesh), microbatches))


@pytest.mark.parametrize(
    "layout", [{"packing": False, "lead": 0}, {"microbatches": 2, "axes": {"data": 2, "tensor": 2}}], ids=str
)
def test_every_layout_has_the_same_loss_gradient_and_metrics(layout):
    loss, gradient, weight, metrics = layout_of()
    theirs = layout_of(**{**layout, "axes": tuple(layout.get("axes", {}).items())})
    np.testing.assert_allclose(theirs[0], loss, rtol=1e-5)
    np.testing.assert_allclose(theirs[1]["tokens"], gradient["tokens"], atol=1e-5 * np.abs(gradient["tokens"]).max())
    counted = sum(len(answer) for group in prepared_groups(6) for answer in group.choices)
    assert theirs[2] == weight == counted - len(prepared_groups(6)[1].choices[2])
    assert 0 < metrics["clip_share"] < 1 and metrics["kl"] > 0
    for name, value in metrics.items():
        np.testing.assert_allclose(theirs[3][name], value, rtol=1e-4, err_msg=name)


def ids_of(completions, **_):
    return [float(len(text)) for text in completions]


def stream(base, objective, seed=0):
    questions = [
        Example(group.ids, group.predicted, (np.zeros(1, np.int32),), 0, number)
        for number, group in enumerate(random_groups(5, LONGEST))
    ]
    planned = objective.planned(questions)
    plan = plan_batches(planned, lead=len(HEAD), batch_size=2, **multiples(base.mesh))
    judge = Judge((Reward("length", ids_of),), 0.0, objective.max_new_tokens, objective.temperature)
    judged = Questions([{"number": number} for number in range(5)], judge)
    method = PromptTuning(length=VIRTUAL)
    return RolloutBatches(base, method, objective, planned, plan, judged, batch_size=2, seed=seed)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_rollouts_are_functions_of_the_seed_their_number_and_the_prompt():
    base = base_of()
    objective = Grpo(group_size=GROUP, max_new_tokens=LONGEST, updates=2, clip_low=1e-3, clip_high=1e-3)
    one, other, changed = tokens(base), tokens(base, 4), stream(base, objective, seed=1)
    first = stream(base, objective)
    with pytest.raises(ConfigError, match="call sample first"):
        next(first)
    batches, states = [], []
    for params in (one, other, other, one):  # the second is ignored, in the middle of a rollout
        first.sample(params)
        batches.append(next(first))
        states.append(json.loads(json.dumps(first.get_state())))
        compiled = programs(base.mesh, base.layout).decode._cache_size()
    assert same(batches[0], batches[1]) and same(batches[2], batches[3]) and not same(batches[0], batches[2])
    changed.sample(one)
    assert not same(next(changed), batches[0])
    numbers = [set(batch.rows.examples[batch.rows.examples >= 0].tolist()) for batch in batches[::2]]
    assert [len(own) for own in numbers] == [2, 2] and not numbers[0] & numbers[1]  # each question once per epoch
    again = stream(base, objective)
    for number in (1, 2):
        again.set_state(states[number - 1])
        again.sample(other)
        assert same(next(again), batches[number])
    again.sample(one)
    assert same(next(again), batches[3])
    assert programs(base.mesh, base.layout).decode._cache_size() == compiled, "a change of the prompt compiled"
    # The log-probabilities of sampling are those of training, so that no ratio is clipped at first.
    metrics = gradient_of(objective, base.model, one, place_batch(batches[0], base.mesh), 1)[3]
    assert metrics["clip_share"] == 0
    moved = gradient_of(objective, base.model, other, place_batch(batches[0], base.mesh), 1)[3]
    assert moved["clip_share"] > 0


def test_a_forced_first_token_has_no_ratio(tmp_path):
    """The prompt that samples an answer does not choose it, so that nothing is clipped or learned for it."""
    write_tiny_checkpoint(tmp_path, "bart")
    (tmp_path / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": 17}))
    base = load_base(str(tmp_path), dtype="float32")
    encoder = encoder_for(base, Template(prompt="<soft>{text}", target="{label}", virtual_tokens=VIRTUAL))
    ids, objective = encoder.prompt_ids({"text": "the"}), dataclasses.replace(OBJECTIVE, beta=0.0)
    question = Example(ids, np.zeros(len(ids), bool), (np.zeros(1, np.int32),), 0, 0, starts=len(ids) - 1)
    planned = objective.planned([question])
    judge = Judge((Reward("length", ids_of),), 0.0, LONGEST, 1.0)
    plan = plan_batches(planned, lead=0, batch_size=1)
    found = RolloutBatches(
        base, PromptTuning(length=VIRTUAL), objective, planned, plan, Questions([{}], judge), batch_size=1, seed=0
    )
    params = tokens(base)
    found.sample(params)
    batch = next(found)
    old = batch.rows.extra["old"][0, 0]
    assert old.shape == (GROUP, LONGEST) and np.isnan(old[:, 0]).all() and np.isfinite(old[:, 1:]).all()
    loss, gradient, _, metrics = gradient_of(objective, base.model, params, place_batch(batch, base.mesh), 1)
    assert metrics["clip_share"] == 0 and np.isfinite(loss) and np.isfinite(gradient["tokens"]).all()


def test_range_tests_and_long_prompts_are_refused():
    with pytest.raises(ConfigError, match="Grpo samples answers of one prompt, so a range test cannot use it"):
        check_samples_alone(OBJECTIVE, "a range test")
    base = base_of()
    longest = base.layout.max_positions
    with pytest.raises(ConfigError, match=rf"loss.max_new_tokens={longest} make .* has {longest} positions"):
        stream(base, Grpo(group_size=2, max_new_tokens=longest))
