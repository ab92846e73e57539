"""Training through a float16 base: gradients neither vanish nor overflow, and what cannot be mended is named."""

import dataclasses
import functools
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.batches import pack, plan_batches
from spt_jax.errors import TrainingError
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.prompts.initializers import uniform
from spt_jax.testing import tiny_base
from spt_jax.training import loop, single
from spt_jax.training import step as module
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import NoLog
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.optimizers import make_optimizer
from spt_jax.training.overflow import explain
from spt_jax.training.rate_finder import range_test
from spt_jax.training.step import loss_and_gradient
from tests.examples import HEAD, VIRTUAL, random_examples
from tests.training.test_population import ADAM, MEMBERS, alone, member, population

METHODS = [PromptTuning(length=VIRTUAL, init=uniform(0.5)), PrefixTuning(length=3)]
CHOICES = VerbalizerCrossEntropy(choices=3)


@functools.cache
def base_of(dtype: str, **overrides):
    return tiny_base(dtype=dtype, **overrides)


@functools.cache
def compiled(dtype, method, microbatches, scales):
    """A program of its own for the scales that it was traced with."""
    return jax.jit(functools.partial(loss_and_gradient, method, CHOICES, microbatches=microbatches))


def gradient_of(dtype, method, weight=1.0, microbatches=1):
    """Loss, and the gradient as one vector, of examples that all have the same weight."""
    base, examples = base_of(dtype), random_examples("choices", 8)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=8, multiple=2), (weight,) * 3)
    params = method.init_params(jax.random.key(1), base_of("float32"))
    program = compiled(dtype, method, microbatches, (module.LOSS_SCALE, module.LEAST_SCALE))
    loss, gradient, _ = program(base.model, params, batch)
    return float(loss), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


def off(gradient, expected) -> float:
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e7])
def test_gradients_are_those_of_float32(method, weight):
    """The weights of examples are relative: the mean loss and its gradient do not depend on them, cotangents do."""
    loss, expected = gradient_of("float32", method)
    ours, gradient = gradient_of("float16", method, weight)
    assert ours == pytest.approx(loss, rel=2e-3)
    assert off(gradient, expected) < 0.02
    assert gradient.dtype == np.float32


@pytest.mark.parametrize("weight", [1e-6, 1e7])
def test_without_scaling_they_would_be_lost(monkeypatch, weight):
    monkeypatch.setattr(module, "LOSS_SCALE", 1.0)
    monkeypatch.setattr(module, "LEAST_SCALE", 1.0)
    _, expected = gradient_of("float32", METHODS[0])
    _, gradient = gradient_of("float16", METHODS[0], weight)
    assert not off(gradient, expected) < 0.1


def test_microbatches_are_exact():
    _, whole = gradient_of("float16", METHODS[0])
    _, parts = gradient_of("float16", METHODS[0], microbatches=2)
    assert off(parts, whole) < 5e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_have_no_scale(dtype):
    """Their program has no loop around the gradient."""
    base = base_of(dtype)
    examples = random_examples("choices", 4)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=4))
    params = METHODS[0].init_params(jax.random.key(1), base)
    traced = jax.make_jaxpr(loss_and_gradient, static_argnums=(0, 1))(METHODS[0], CHOICES, base.model, params, batch)
    assert "while" not in {str(equation.primitive) for equation in traced.eqns}


def run(workdir, **options) -> dict[int, float]:
    """Trains for 16 steps with a checkpoint every 4; the losses."""
    own = MEMBERS[1]
    optimizer = make_optimizer(dataclasses.replace(ADAM, learning_rate=0.05), 16)
    found = {}

    class Log(NoLog):
        def write(self, step, values):
            found[step] = values["loss"]

    single.fit(
        base_of("float16"),
        own.method,
        optimizer,
        CrossEntropy(),
        single.TrainingData(own.examples, own.plan),
        TrainConfig(steps=16, batch_size=6, evaluate_every=16, checkpoint_every=4),
        workdir=workdir,
        log=lambda step: Log(),
        validate=None,
        save_best=lambda best: np.save(workdir / "prompt.npy", best.params["tokens"]),
        metadata={},
        **options,
    )
    return found


def test_a_run_that_is_stopped_and_resumed(tmp_path, monkeypatch):
    """It learns; 8 steps, a checkpoint and 8 more give the same bits as 16."""
    whole = run(tmp_path / "whole")
    assert np.mean([whole[step] for step in range(13, 17)]) < 0.9 * np.mean([whole[step] for step in range(1, 5)])
    place, calls = single.place_batch, []

    def stop_at_8(batch, mesh):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return place(batch, mesh)

    with monkeypatch.context() as patched:
        patched.setattr(single, "place_batch", stop_at_8)
        with pytest.raises(loop.Stopped, match="after step 8"):
            run(tmp_path / "parts")
    rest = run(tmp_path / "parts", resume=True)
    assert rest == {step: whole[step] for step in range(9, 17)}
    ours, theirs = (np.load(tmp_path / name / "prompt.npy") for name in ("parts", "whole"))
    assert ours.tobytes() == theirs.tobytes()


def test_a_population_s_members_are_those_of_runs_of_their_own(tmp_path):
    base = base_of("float16")
    log, standings = population(base, MEMBERS[:2], tmp_path, group_size=2)
    for number, own in enumerate(MEMBERS[:2]):
        assert standings[number].ended == "finished"
        expected, _ = alone(base, member(own.seed, own.learning_rate))
        np.testing.assert_allclose(list(log.by_member[str(number)].values()), expected, rtol=5e-3)


def test_a_base_that_overflows_is_named(tmp_path):
    """In the first step it is never the learning rate: in a population and a range test."""
    base = base_of("float16")
    layers = base.params["layers"]
    down = {"kernel": jnp.full_like(layers["mlp"]["down"]["kernel"], 6e4)}
    layers = {**layers, "mlp": {**layers["mlp"], "down": down}}
    model = dataclasses.replace(base.model, params={**base.params, "layers": layers})
    base = dataclasses.replace(base, model=model)
    _, (standing, _) = population(base, MEMBERS[:2], tmp_path, group_size=2)
    assert standing.ended.startswith("dropped at step 1: ")
    assert "base.dtype bfloat16 or float32" in standing.ended and "learning_rate" not in standing.ended
    assert "loss is nan" in standing.ended
    with pytest.raises(TrainingError, match=r"step 1: .*loss is .*float16 overflowed in the base: use base\.dtype"):
        range_test(base, MEMBERS[0], ADAM, CrossEntropy(), batch_size=6, steps=10)


@pytest.mark.parametrize(
    ("step", "broken", "dtype", "cause", "not_the_cause"),
    [
        (1, "loss", "float16", "float16 overflowed in the base: use base.dtype bfloat16 or float32", "learning_rate"),
        (1, "gradient_norm", "float16", "float16 overflowed", "learning_rate"),
        (1, "prompt_norm", "float32", "A lower optimizer.learning_rate usually helps", "float16"),
        (1, "loss", "bfloat16", "before any update, so the learning rate is not the cause", "A lower"),
        (7, "loss", "float16", "Either float16 overflowed", "before any update"),
        (7, "loss", "bfloat16", "A lower optimizer.learning_rate usually helps", "float16 "),
    ],
)
def test_what_is_said_of_numbers_that_are_not_finite(step, broken, dtype, cause, not_the_cause):
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "prompt_norm": 1.0}
    assert explain(step, metrics, dtype) is None
    said = explain(step, {**metrics, broken: math.nan}, jnp.dtype(dtype))
    assert said is not None and said.startswith(f"{broken} is nan") and cause in said and not_the_cause not in said
