"""A step compiled in a thread is the same step, compiled once; its errors are raised when it is called."""

import threading

import jax
import numpy as np
import optax
import pytest

from spt_jax.data.batches import Batch, pack, place_batch, plan_batches
from spt_jax.errors import ConfigError
from spt_jax.prompts import PromptTuning
from spt_jax.testing import tiny_base
from spt_jax.training.ahead import compile_ahead
from spt_jax.training.config import TrainConfig
from spt_jax.training.objectives import CrossEntropy, Distillation
from spt_jax.training.single import TrainingData, start_ahead
from spt_jax.training.step import init_state, jit_train_step, make_train_step
from tests.examples import HEAD, VIRTUAL, random_examples

METHOD = PromptTuning(length=VIRTUAL)


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


def batch_of(base, count: int, seed: int) -> Batch:
    examples = random_examples("target", count, seed=seed)
    return place_batch(
        pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=count, packing=False)), base.mesh
    )


def test_the_step_is_the_same_and_is_compiled_once(base):
    """The second batch has other shapes, so that it is compiled as usual; the third has those of the first."""
    optimizer = optax.adam(0.1)
    batches = [batch_of(base, 4, 0), batch_of(base, 2, 1), batch_of(base, 4, 0)]
    plain, states = make_train_step(base, METHOD, optimizer), []
    step = jit_train_step(base, METHOD, optimizer)
    state = init_state(jax.random.key(0), base, METHOD, optimizer)
    ahead, compiled = compile_ahead(step, base.model, state, batches[0]), []
    for run in (plain, ahead):
        state = init_state(jax.random.key(0), base, METHOD, optimizer)
        for batch in batches:
            state, metrics = run(state, batch)
            compiled.append(step._cache_size())
        states.append((state, metrics))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert compiled == [0, 0, 0, 0, 1, 1]


def test_it_is_compiled_in_another_thread_and_its_error_is_raised_by_the_call(base):
    threads = []

    def fails(model, state, batch):
        threads.append(threading.current_thread())
        raise ConfigError("no such step")

    state, batch = init_state(jax.random.key(0), base, METHOD, optax.sgd(0.1)), batch_of(base, 2, 0)
    ahead = compile_ahead(jax.jit(fails), base.model, state, batch)
    with pytest.raises(ConfigError, match="no such step"):
        ahead(state, batch)
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


def test_batches_that_are_not_known_before_the_run_are_left_to_it(base, tmp_path):
    (tmp_path / "text.txt").write_text("One day.")
    examples = random_examples("target", 4, seed=0)
    data = TrainingData(examples, plan_batches(examples, lead=len(HEAD), batch_size=2))
    config = TrainConfig(steps=2, batch_size=2)
    objective = Distillation(text=str(tmp_path / "text.txt"))
    assert start_ahead(base, METHOD, optax.sgd(0.1), objective, data, config) is None
    start = start_ahead(base, METHOD, optax.sgd(0.1), CrossEntropy(), data, config)
    assert start is not None and int(start.state.step) == 0
