"""The range test: its steps are those of training, and it stops where the loss blows up."""

import json

import numpy as np
import pytest

from spt_jax.__main__ import main
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.training import rate_finder
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.rate_finder import SMOOTHING, range_test
from tests.jobs import words, write_task
from tests.training.test_population import ADAM, BATCH, alone, base_of, member


def test_the_first_step_is_that_of_a_run(monkeypatch):
    monkeypatch.setattr(rate_finder, "_fall", lambda losses, lowest: (1.0, 0.0))  # ten steps fall by less than noise
    base, own = base_of(), member(seed=3, rate=0.01)
    found = range_test(base, own, ADAM, CrossEntropy(), batch_size=BATCH, low=0.01, high=0.1, steps=10)
    losses, _ = alone(base, own)
    # The second loss is that of the first step, which both took at the rate 0.01.
    np.testing.assert_array_equal(found.losses[:2], losses[:2])
    np.testing.assert_allclose(found.rates, 0.01 * 10 ** (np.arange(10) / 9))
    weights = SMOOTHING ** np.arange(10)[::-1]
    assert found.smoothed[-1] == pytest.approx((weights * found.losses).sum() / weights.sum())
    assert found.suggested == pytest.approx(found.rates[found.smoothed.argmin()] / 10)


@pytest.mark.parametrize("end", [float("nan"), 1e6])
def test_it_stops_where_the_loss_blows_up(monkeypatch, end: float):
    """Losses of our own: they fall until step 15, rise a little, and blow up at step 21."""
    losses = iter([*np.linspace(5.0, 1.0, 15), *np.linspace(1.0, 2.0, 5), end])

    def step(states, rates, batch):
        return states, {"loss": np.asarray([next(losses)], np.float32)}

    monkeypatch.setattr(rate_finder, "make_population_step", lambda *arguments: step)
    found = range_test(base_of(), member(), ADAM, CrossEntropy(), batch_size=BATCH, low=1e-3, high=1e3, steps=60)
    assert len(found.rates) == len(found.losses) == 20 and np.isfinite(found.losses).all()
    assert found.suggested == pytest.approx(found.rates[found.smoothed.argmin()] / 10)


def test_a_loss_that_never_falls_suggests_nothing(monkeypatch):
    losses = iter(np.linspace(1.0, 2.0, 20))

    def step(states, rates, batch):
        return states, {"loss": np.asarray([next(losses)], np.float32)}

    monkeypatch.setattr(rate_finder, "make_population_step", lambda *arguments: step)
    with pytest.raises(TrainingError, match="lowered the loss"):
        range_test(base_of(), member(), ADAM, CrossEntropy(), batch_size=BATCH, steps=20)


def test_a_curve_that_falls_by_less_than_its_noise_suggests_nothing(monkeypatch):
    """Losses of our own, around a line: with noise of deviation 1, falls of 0 and 0.5 cannot be told from none."""

    def suggested(fall):
        losses = iter(10 - np.linspace(0, fall, 100) + np.random.default_rng(0).standard_normal(100))
        step = lambda states, rates, batch: (states, {"loss": np.asarray([next(losses)], np.float32)})  # noqa: E731
        monkeypatch.setattr(rate_finder, "make_population_step", lambda *arguments: step)
        return range_test(base_of(), member(), ADAM, CrossEntropy(), batch_size=BATCH).suggested

    assert suggested(4.0) > 0
    for fall in (0.0, 0.5):
        with pytest.raises(TrainingError, match=r"too flat to choose from.*--high"):
            suggested(fall)


def test_tests_that_cannot_be(monkeypatch):
    base = base_of()
    for wrong in ({"low": 0.0}, {"low": 1.0, "high": 0.1}, {"steps": 5}):
        with pytest.raises(ConfigError, match="a range test needs rates"):
            range_test(base, member(), ADAM, CrossEntropy(), batch_size=BATCH, **wrong)
    monkeypatch.setattr(rate_finder, "BLOWN_UP", 0.5)
    with pytest.raises(TrainingError, match="start lower than"):
        range_test(base, member(), ADAM, CrossEntropy(), batch_size=BATCH, steps=20)


def test_the_command_suggests_and_writes(tmp_path, capsys):
    write_task(tmp_path)
    line = words(tmp_path, tmp_path / "out")
    assert main(["find-rate", *line, "--rates", "12"]) == 0
    found = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert f"--optimizer.learning-rate {found['suggested']:.2g}" in capsys.readouterr().out
    assert len(found["rates"]) == len(found["losses"]) <= 12
    assert (tmp_path / "out" / "rates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["find-rate", *line]) == 2
    assert "already exists. Use --overwrite" in capsys.readouterr().err
