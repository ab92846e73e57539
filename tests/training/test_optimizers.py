"""Schedules against closed forms, updates against the papers' formulas written out in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from spt_jax.bases.families import FAMILIES
from spt_jax.errors import ConfigError
from spt_jax.training.optimizers import (
    OPTIMIZER_DEFAULTS,
    OptimizerConfig,
    learning_rates,
    make_optimizer,
    make_schedule,
    resolve_optimizer,
)

STEPS = 50


def resolved(**options) -> OptimizerConfig:
    return resolve_optimizer(OptimizerConfig(**{"name": "adam", "clip_norm": 0.0, **options}), "llama")


def rates(**options) -> list[float]:
    schedule = make_schedule(resolved(learning_rate=0.5, **options), STEPS)
    return [float(schedule(step)) for step in range(STEPS + 3)]


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_schedules_follow_their_closed_forms(name, warmup):
    actual = rates(schedule=name, warmup_steps=warmup)
    for step in range(STEPS + 3):
        left = max(STEPS - step, 0) / (STEPS - warmup)
        decay = {
            "constant": 1.0,
            "linear": left,
            "cosine": math.sin(math.pi / 2 * left) ** 2,
            "inverse_sqrt": math.sqrt(max(warmup, 1) / max(step, 1)),
        }[name]
        expected = 0.5 * (step / warmup if step < warmup else decay if step else 1.0)
        assert actual[step] == pytest.approx(expected, abs=1e-7), step
    config = resolved(learning_rate=0.5, schedule=name, warmup_steps=warmup)
    np.testing.assert_allclose(learning_rates(config, STEPS), actual[:STEPS], atol=1e-7)
    np.testing.assert_allclose(learning_rates(config, STEPS, 0.25), np.asarray(actual[:STEPS]) / 2, atol=1e-7)
    assert (actual[0] > 0) == (warmup == 0)
    assert max(actual) == pytest.approx(0.5)
    if name in ("linear", "cosine"):
        assert actual[STEPS - 1] > actual[STEPS] == 0.0


def test_cosine_is_that_of_optax():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, STEPS)
    expected = [float(schedule(step)) for step in range(STEPS + 3)]
    np.testing.assert_allclose(rates(schedule="cosine", warmup_steps=10), expected, atol=1e-7)


def test_a_warm_up_may_fill_the_run_but_not_more():
    assert rates(schedule="linear", warmup_steps=STEPS)[STEPS - 1] == pytest.approx(0.5 * (STEPS - 1) / STEPS)
    with pytest.raises(ConfigError, match="warmup_steps is 51, which does not fit in a run of 50 steps"):
        rates(warmup_steps=STEPS + 1)


RATE, DECAY = 0.1, 0.02


def signs_and_moments(kind: str, start: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """Parameters after each step; b1 = 0.8, b2 = 0.95, momentum 0.6, linear schedule over STEPS."""
    p, m, v, out = start.astype(np.float64), 0.0, 0.0, []
    for t, g in enumerate(gradients):
        rate = RATE * (1 - t / STEPS)
        if kind in ("adam", "adamw"):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            step = (m / (1 - 0.8 ** (t + 1))) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
            p = p - rate * (step + (DECAY * p if kind == "adamw" else 0.0))
        elif kind == "lion":
            step = np.sign(0.8 * m + 0.2 * g)
            m = 0.95 * m + 0.05 * g
            p = p - rate * (step + DECAY * p)
        elif kind == "sgd":
            m = 0.6 * m + g + DECAY * p
            p = p - rate * m
        else:
            v = (1 - (t + 1) ** -0.8) * v + (t + 1) ** -0.8 * (g**2 + 1e-30)
            step = g / np.sqrt(v)
            step = step / max(1.0, math.sqrt(np.mean(step**2)))
            p = p - rate * step - DECAY * p
        out.append(p)
    return out


def apply(config: OptimizerConfig, start, gradients) -> list[np.ndarray]:
    optimizer = make_optimizer(config, STEPS)
    params, out = {"prompt": jnp.asarray(start)}, []
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update({"prompt": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        out.append(np.asarray(params["prompt"]))
    return out


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    # The later gradients are larger, so that Adafactor clips its updates.
    gradients = [(scale * rng.normal(size=(5, 7))).astype(np.float32) for scale in (0.1, 1.0, 3.0)]
    return start, gradients


OWN = {
    "adam": {"b1": 0.8, "b2": 0.95},
    "adamw": {"b1": 0.8, "b2": 0.95, "weight_decay": DECAY},
    "lion": {"b1": 0.8, "b2": 0.95, "weight_decay": DECAY},
    "sgd": {"momentum": 0.6, "weight_decay": DECAY},
    "adafactor": {"weight_decay": DECAY},
}


@pytest.mark.parametrize("name", OWN)
def test_updates_equal_the_formulas(name, problem):
    config = resolved(name=name, learning_rate=RATE, schedule="linear", **OWN[name])
    for actual, expected in zip(apply(config, *problem), signs_and_moments(name, *problem), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_adafactor_factors_large_prompts_only():
    rng = np.random.default_rng(1)
    config = resolve_optimizer(OptimizerConfig(name="adafactor"), "llama")
    assert (config.learning_rate, config.schedule, config.weight_decay, config.clip_norm) == (0.3, "constant", 1e-5, 0)
    for shape in ((128, 130), (127, 130)):
        start, g = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        rows, columns = np.mean(g**2, 1, keepdims=True), np.mean(g**2, 0, keepdims=True)
        second = rows * columns / np.mean(rows) if shape[0] == 128 else g**2
        step = g / np.sqrt(second)
        step /= max(1.0, np.sqrt(np.mean(step**2)))
        (actual,) = apply(config, start, [g])
        np.testing.assert_allclose(actual, start - 0.3 * step - 1e-5 * start, rtol=1e-5, atol=1e-5)


def test_adafactor_momentum_averages_updates(problem):
    start, gradients = problem
    config = resolved(name="adafactor", learning_rate=RATE, weight_decay=0.0, momentum=0.5)
    first, second, _ = apply(config, start, gradients)
    signs = np.sign(gradients[0])
    np.testing.assert_allclose(first, start - 0.5 * RATE * signs, atol=1e-6)
    plain = apply(dataclasses.replace(config, momentum=0.0), start, gradients)
    np.testing.assert_allclose(second - first, 0.25 * (plain[0] - start) + 0.5 * (plain[1] - plain[0]), atol=1e-6)


def test_clipping_is_of_the_global_norm_and_exact():
    config = resolved(name="sgd", learning_rate=0.5, momentum=0.0, clip_norm=2.0)
    optimizer = make_optimizer(config, STEPS)
    params = {"a": jnp.zeros(2), "b": jnp.zeros((1, 1))}
    state = optimizer.init(params)
    small = {"a": jnp.array([0.3, -0.4]), "b": jnp.array([[1.2]])}
    updates, _ = optimizer.update(small, state, params)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -0.5 * g), updates, small)
    large = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[12.0]])}
    updates, _ = optimizer.update(large, state, params)
    np.testing.assert_allclose(updates["a"], [-3 / 13, 4 / 13], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [[-12 / 13]], rtol=1e-6)
    off = make_optimizer(dataclasses.replace(config, clip_norm=0.0), STEPS)
    updates, _ = off.update(large, off.init(params), params)
    np.testing.assert_array_equal(updates["b"], [[-6.0]])


@pytest.mark.parametrize("name", OPTIMIZER_DEFAULTS)
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_first_update_moves_unless_it_warms_up(name, warmup, problem):
    start, gradients = problem
    first, second, _ = apply(resolved(name=name, weight_decay=0.0, warmup_steps=warmup), start, gradients)
    assert np.all(first != start) == (warmup == 0)
    assert np.all(second != first)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_defaults_for_every_optimizer(family):
    own = resolve_optimizer(OptimizerConfig(), family)
    assert own.name in OPTIMIZER_DEFAULTS
    for name in (None, *OPTIMIZER_DEFAULTS):
        config = resolve_optimizer(OptimizerConfig(name=name), family)
        assert config == resolve_optimizer(config, family)
        make_optimizer(config, 1000)


def test_a_family_without_defaults_of_its_own_takes_the_general_ones():
    assert resolve_optimizer(OptimizerConfig(), "another") == resolve_optimizer(OptimizerConfig(), "llama")


def test_the_user_wins_over_the_defaults():
    given = OptimizerConfig(
        name="adamw",
        learning_rate=0.7,
        schedule="cosine",
        warmup_steps=3,
        weight_decay=0.0,
        clip_norm=0.0,
        b1=0.0,
        b2=0.5,
    )
    assert resolve_optimizer(given, "gpt2") == given
    assert resolve_optimizer(OptimizerConfig(learning_rate=0.7), "llama").learning_rate == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamx"}, r"optimizer\.name 'adamx' is unknown; did you mean 'adam"),
        ({"schedule": "cosin"}, r"optimizer\.schedule 'cosin' is unknown; did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "must be a number above 0"),
        ({"learning_rate": -0.1}, r"learning_rate is -0\.1"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": "0.3"}, r"learning_rate is '0\.3'; it must be a number"),
        ({"weight_decay": -1e-5}, "weight_decay is -1e-05"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0"),
        ({"momentum": 1.0}, r"momentum is 1\.0; it must be a number, at least 0 and below 1"),
        ({"b1": 1.5}, r"b1 is 1\.5"),
        ({"b2": -0.1}, r"b2 is -0\.1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 2.5}, r"warmup_steps is 2\.5; it must be an integer"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight_decay; adafactor, adamw, sgd, lion have it"),
        ({"name": "sgd", "b1": 0.9}, "sgd has no b1"),
        ({"name": "adafactor", "b2": 0.9}, "adafactor has no b2"),
        ({"name": "lion", "momentum": 0.9}, "lion has no momentum; adafactor, sgd have it"),
    ],
)
def test_wrong_values(options, message, monkeypatch):
    # A user meets these messages, not the tests' type checker.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**options)


def test_wrong_only_once_the_family_is_known():
    with pytest.raises(ConfigError, match="adam has no momentum"):
        resolve_optimizer(OptimizerConfig(momentum=0.9), "llama")
    with pytest.raises(ConfigError, match=r"does not set .*learning_rate.*; call resolve_optimizer first"):
        make_optimizer(OptimizerConfig(name="sgd"), STEPS)
