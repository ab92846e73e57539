"""A population's members train as they would alone."""

import dataclasses
import functools
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from spt_jax.data.batches import place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.streams import training_batches
from spt_jax.errors import ConfigError
from spt_jax.prompts import PrefixTuning, PromptTuning, initializers
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base
from spt_jax.training import halving as module
from spt_jax.training.config import TrainConfig
from spt_jax.training.halving import Halving, fit_population
from spt_jax.training.logs import NoLog
from spt_jax.training.loop import Stopped
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.population import (
    Member,
    aligned_plans,
    common_method,
    init_members,
    make_population_step,
    stack_batches,
)
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step

STEPS, BATCH, VOCAB = 8, 6, 320
ADAM = resolve_optimizer(OptimizerConfig(learning_rate=0.01), "llama")
CONFIG = TrainConfig(steps=STEPS, batch_size=BATCH, evaluate_every=4, checkpoint_every=4)


@functools.cache
def base_of(**axes: int):
    return tiny_base("llama", mesh=make_mesh(MeshConfig(**axes)))


def examples_of(length: int, count: int = 24) -> list[Example]:
    """P virtual tokens and BOS, some text, and one id to predict that follows from it."""
    random = np.random.default_rng(5)
    examples = []
    for index in range(count):
        text = random.integers(3, VOCAB, 3 + index % 4)
        ids = np.asarray([*(VOCAB + np.arange(length)), 1, *text, text[0]], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) == len(ids) - 1, (), 0, index))
    return examples


def member(seed: int = 0, rate: float = 0.01, length: int = 4, method=None, **axes: int) -> Member:
    examples = examples_of(length)
    multiple = axes.get("data", 1)
    plan = plan_batches(examples, lead=length + 1, batch_size=BATCH, multiple=multiple)
    return Member(method or PromptTuning(length=length), examples, plan, seed, rate)


_loss = jax.jit(loss_and_gradient, static_argnames=("method", "objective"))


def validation(base, members):
    """The loss on the first examples."""

    def validate(number: int, params) -> dict:
        own = members[number]
        stream = training_batches(own.examples, own.plan, batch_size=BATCH, seed=99)
        batch = place_batch(next(stream), base.mesh)
        loss = _loss(own.method, CrossEntropy(), base.model, params, batch)[0]
        return {"loss": float(loss)}

    return validate


class Losses(NoLog):
    """Keeps each member's losses by step."""

    def __init__(self) -> None:
        self.by_member: dict[str, dict[int, float]] = {}

    def write(self, step, values) -> None:
        for number, loss in values.get("loss", {}).items():
            self.by_member.setdefault(number, {})[step] = loss


def population(base, members, workdir, *, losses=None, optimizer=ADAM, **options):
    log = Losses() if losses is None else losses
    return log, fit_population(
        base,
        members,
        optimizer,
        CrossEntropy(),
        CONFIG,
        workdir=Path(workdir),
        log=lambda step: log,
        validate=validation(base, members),
        **options,
    )


def alone(base, own: Member) -> tuple[list[float], dict]:
    """Losses and last parameters of a run of its own, which happens once."""
    if id(own) not in _ALONE:  # with the member, for an id is only its own while it lives
        _ALONE[id(own)] = own, _alone(base, own)
    return _ALONE[id(own)][1]


_ALONE: dict = {}


def _alone(base, own: Member) -> tuple[list[float], dict]:
    optimizer = make_optimizer(dataclasses.replace(ADAM, learning_rate=own.learning_rate), STEPS)
    state = init_state(jax.random.key(own.seed), base, own.method, optimizer)
    step = make_train_step(base, own.method, optimizer)
    stream = training_batches(own.examples, own.plan, batch_size=BATCH, seed=own.seed)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, place_batch(next(stream), base.mesh))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


MEMBERS = [
    member(0),
    member(1, 0.02),
    member(0, 0.005, method=PromptTuning(length=4, init=initializers.uniform())),
    member(2, 0.01),
]


@pytest.mark.parametrize(("size", "tolerance"), [(1, 0.0), (3, 1e-4)])
def test_members_are_runs_of_their_own(size, tolerance, tmp_path):
    """One by one, bit for bit. Groups of three leave the fourth alone."""
    base = base_of()
    log, standings = population(base, MEMBERS, tmp_path, group_size=size)
    for number, (own, standing) in enumerate(zip(MEMBERS, standings, strict=True)):
        losses, params = alone(base, own)
        assert list(log.by_member[str(number)]) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(log.by_member[str(number)].values()), losses, atol=tolerance, rtol=0)
        assert standing.ended == "finished" and standing.steps == STEPS
        if standing.best.step == STEPS:
            np.testing.assert_allclose(standing.best.params["tokens"], params["tokens"], atol=10 * tolerance, rtol=0)
    assert any(standing.best.step == STEPS for standing in standings)


def test_lengths_by_padding(tmp_path):
    """Two and five virtual tokens in one program; what the shorter one learns has its own length."""
    base, members = base_of(), [member(0, length=2), member(1, length=5)]
    log, standings = population(base, members, tmp_path, group_size=2)
    for number, own in enumerate(members):
        losses, _ = alone(base, own)
        np.testing.assert_allclose(list(log.by_member[str(number)].values()), losses, atol=1e-4)
        assert standings[number].best.params["tokens"].shape == (own.method.token_count, 32)


def test_another_method_on_a_mesh(tmp_path):
    axes = {"data": 2, "tensor": 2}
    prefix = PrefixTuning(length=3)
    members = [member(seed, method=prefix, length=4, data=2) for seed in (0, 1)]
    members = [dataclasses.replace(own, examples=_without_virtual(own.examples)) for own in members]
    members = [
        dataclasses.replace(own, plan=plan_batches(own.examples, lead=1, batch_size=BATCH, multiple=2))
        for own in members
    ]
    log, _ = population(base_of(**axes), members, tmp_path, group_size=2)
    for number, own in enumerate(members):
        np.testing.assert_allclose(list(log.by_member[str(number)].values()), alone(base_of(), own)[0], atol=1e-4)


def _without_virtual(examples):
    return [dataclasses.replace(e, ids=e.ids[e.ids < VOCAB], predicted=e.predicted[e.ids < VOCAB]) for e in examples]


def test_losers_stop_and_survivors_do_not_notice(tmp_path):
    base = base_of()
    whole, all_standings = population(base, MEMBERS, tmp_path / "whole", group_size=1)
    log, standings = population(
        base, MEMBERS, tmp_path / "halved", group_size=1, halving=Halving(rungs=(0.25, 0.5), keep=0.5)
    )
    assert sorted(standing.steps for standing in standings) == [2, 2, 4, STEPS]
    assert sorted(standing.ended for standing in standings) == [
        "finished", "halved at step 2", "halved at step 2", "halved at step 4"
    ]  # fmt: skip
    for number, losses in log.by_member.items():
        assert losses == {step: whole.by_member[number][step] for step in losses}
    (winner,) = [number for number, standing in enumerate(standings) if standing.ended == "finished"]
    assert standings[winner].best.metrics == all_standings[winner].best.metrics


def test_a_member_that_is_not_finite_is_dropped_and_named(tmp_path, capsys):
    base = base_of()
    members = [MEMBERS[0], dataclasses.replace(MEMBERS[1], learning_rate=1e38), MEMBERS[3]]
    log, standings = population(base, members, tmp_path, group_size=3)
    assert standings[1].ended.startswith("dropped at step") and "step 1: prompt_norm is inf" in standings[1].ended
    assert "member 1 is dropped at step" in capsys.readouterr().err
    for number in (0, 2):
        assert standings[number].ended == "finished"
        losses, _ = alone(base, members[number])
        np.testing.assert_allclose(list(log.by_member[str(number)].values()), losses, atol=1e-4)


def test_stopped_and_resumed_is_the_same(tmp_path, monkeypatch):
    base, options = base_of(), {"group_size": 1, "halving": Halving(rungs=(0.5,), keep=0.5)}
    whole, expected = population(base, MEMBERS, tmp_path / "whole", **options)
    place, calls = module.place_batch, []

    def place_and_stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4 * 2 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(*args, **kwargs)

    monkeypatch.setattr(module, "place_batch", place_and_stop)
    log = Losses()
    with pytest.raises(Stopped, match="after step 3"):
        population(base, MEMBERS, tmp_path / "stopped", losses=log, **options)
    monkeypatch.undo()
    log, standings = population(base, MEMBERS, tmp_path / "stopped", losses=log, resume=True, **options)
    assert log.by_member == whole.by_member
    for ours, theirs in zip(standings, expected, strict=True):
        assert (ours.steps, ours.ended, ours.best.step) == (theirs.steps, theirs.ended, theirs.best.step)
        assert ours.best.params["tokens"].tobytes() == theirs.best.params["tokens"].tobytes()


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match="population is empty"):
        common_method([])
    with pytest.raises(ConfigError, match="member 1 has another method"):
        common_method([member(), member(method=PrefixTuning(length=4))])
    lengths = [dataclasses.replace(member(), method=PrefixTuning(length=n)) for n in (3, 4)]
    with pytest.raises(ConfigError, match="must be of one length"):
        common_method(lengths)
    other = dataclasses.replace(member(), plan=dataclasses.replace(member().plan, choices=3))
    with pytest.raises(ConfigError, match="unequal numbers of classes"):
        aligned_plans([member(), other])
    adafactor = resolve_optimizer(OptimizerConfig(name="adafactor"), "llama")
    with pytest.raises(ConfigError, match="depend on padding"):
        population(base_of(), [member(length=2), member(length=3)], tmp_path, optimizer=adafactor)
    with pytest.raises(ConfigError, match="group_size is -1"):
        population(base_of(), MEMBERS, tmp_path, group_size=-1)
    with pytest.raises(ConfigError, match="rungs are"):
        Halving(rungs=(0.5, 0.25))
    with pytest.raises(ConfigError, match="keep is"):
        Halving(keep=1.0)


def test_the_frozen_base_is_no_constant_of_the_program():
    """5 MB of weights."""
    base = tiny_base(hidden_size=128, intermediate_size=1024)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(base.params)) > 5_000_000
    step = make_population_step(base, MEMBERS[0].method, ADAM, STEPS, CrossEntropy())
    own = MEMBERS[0]
    batch = stack_batches([next(training_batches(own.examples, own.plan, batch_size=BATCH, seed=0))] * 2)
    states = init_members(base, MEMBERS[:2], ADAM, STEPS)
    text = step.func.lower(*step.args, states, np.ones(2, np.float32), batch).as_text()
    assert len(text) < 1_000_000
