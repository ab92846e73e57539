"""What an objective prepares reaches the batches of every way to train: once per data set, in the right slots."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.training import halving, rate_finder, single
from spt_jax.training.config import TrainConfig
from spt_jax.training.halving import fit_population
from spt_jax.training.logs import NoLog
from spt_jax.training.objectives import Objective
from spt_jax.training.rate_finder import range_test
from spt_jax.training.single import TrainingData, fit
from tests.training.test_population import ADAM, BATCH, base_of, member

calls = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(Objective):
    """Prepares each example's number."""

    def prepare(self, base, examples):
        calls.append(len(examples))
        return [np.float32(example.index) for example in examples]


def by_fit(monkeypatch, tmp_path, own, seen):
    def step(state, batch):
        seen.append(batch.rows)
        metrics = dict.fromkeys(("loss", "weight", "gradient_norm", "prompt_norm"), jnp.float32(1))
        return dataclasses.replace(state, step=state.step + 1), metrics

    monkeypatch.setattr(single, "make_train_step", lambda *_: step)
    options = {"workdir": tmp_path, "log": lambda step: NoLog(), "validate": None, "metadata": {}}
    data, config = TrainingData(own.examples, own.plan), TrainConfig(steps=3, batch_size=BATCH).resolved()
    fit(base_of(), own.method, optax.sgd(0.1), Numbered(), data, config, save_best=lambda best: None, **options)


def population_step(seen):
    losses = iter(np.linspace(5.0, 1.0, 20))

    def step(states, rates, batch):
        seen.append(batch.rows)
        ones = jnp.ones(len(states), jnp.float32)
        metrics = dict.fromkeys(("weight", "gradient_norm", "prompt_norm"), ones)
        return states, {"loss": jnp.float32(next(losses)) * ones, **metrics}

    return step


def by_population(monkeypatch, tmp_path, own, seen):
    monkeypatch.setattr(halving, "make_population_step", lambda *_: population_step(seen))
    members = [own, dataclasses.replace(own, seed=1)]
    config = TrainConfig(steps=3, batch_size=BATCH)
    fit_population(
        base_of(), members, ADAM, Numbered(), config, workdir=tmp_path, validate=lambda *_: {"loss": 1.0}, group_size=2
    )


def by_range_test(monkeypatch, tmp_path, own, seen):
    monkeypatch.setattr(rate_finder, "make_population_step", lambda *_: population_step(seen))
    range_test(base_of(), own, ADAM, Numbered(), batch_size=BATCH, steps=20)


@pytest.mark.parametrize("train", [by_fit, by_population, by_range_test])
def test_what_is_prepared_reaches_the_batches(monkeypatch, tmp_path, train):
    own, seen = member(), []
    calls.clear()
    train(monkeypatch, tmp_path, own, seen)
    assert calls == [len(own.examples)]
    assert len(seen) >= 3
    for rows in seen:
        numbers, extra = np.asarray(rows.examples), np.asarray(rows.extra)
        np.testing.assert_array_equal(extra, np.where(numbers >= 0, numbers, 0))
        assert extra.any()
