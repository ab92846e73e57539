"""Finds a learning rate by a range test: a short run with increasing rates (Smith 2015, arXiv 1506.01186)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import place_batch
from spt_jax.data.streams import training_batches
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.training.objectives import Objective, prepare_examples
from spt_jax.training.optimizers import OptimizerConfig
from spt_jax.training.overflow import explain
from spt_jax.training.population import Member, init_members, make_population_step, stack_batches
from spt_jax.training.rollouts import check_samples_alone

SMOOTHING = 0.9
MAX_STEPS = 100_000
BLOWN_UP = 4.0  # the smoothed loss that counts as blown up, relative to its minimum


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
      rates, losses: the rate and the loss of each step until the loss blew up.
      smoothed: the exponential moving average of the losses, with bias correction.
      suggested: a tenth of the rate at which the smoothed loss is lowest. Above that rate, the loss rises.
    """

    rates: Float[np.ndarray, " N"]
    losses: Float[np.ndarray, " N"]
    smoothed: Float[np.ndarray, " N"]
    suggested: float


def range_test(
    base: FrozenBase,
    member: Member,
    optimizer: OptimizerConfig,
    objective: Objective,
    *,
    batch_size: int,
    microbatches: int = 1,
    low: float = 1e-4,
    high: float = 10.0,
    steps: int = 100,
    progress: Callable[[int], Any] = lambda step: None,
) -> RangeTest:
    """Trains one prompt at rates that increase geometrically from `low` to `high`, until the loss blows up.

    Args:
      base: the frozen base.
      member: method, data and seed; its learning rate is not used.
      optimizer: a resolved config; its schedule is not used.
      objective: the loss.
      batch_size: examples per step.
      microbatches: the number of parts that a batch is split into.
      low, high: the range of rates.
      steps: the number of rates.
      progress: called after each step with its number.

    Raises:
      ConfigError: the range is empty, or has fewer than 10 steps or more than `MAX_STEPS`.
      TrainingError: the loss blew up within 10 steps, or never fell by more than its noise.
    """
    if not 0 < low < high < math.inf or not 10 <= steps <= MAX_STEPS:
        raise ConfigError(
            f"a range test needs rates that rise from above 0, and 10 to {MAX_STEPS:,} steps, not {low} to {high} in"
            f" {steps} steps"
        )
    check_samples_alone(objective, "a range test")
    optimizer = dataclasses.replace(optimizer, schedule="constant", warmup_steps=0)
    states = init_members(base, [member], optimizer, steps)
    step = make_population_step(base, member.method, optimizer, steps, objective, microbatches)
    examples = prepare_examples(objective, base, member.examples)
    stream = training_batches(
        examples, member.plan, batch_size=batch_size, seed=member.seed, class_weights=member.class_weights
    )
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    for number, rate in enumerate(rates, 1):
        batch = place_batch(stack_batches([next(stream)]), base.mesh, stacked=True)
        states, metrics = step(states, np.asarray([rate], np.float32), batch)
        values = {name: float(value[0]) for name, value in jax.device_get(metrics).items()}
        loss = values["loss"]
        if number == 1 and not math.isfinite(loss):
            raise TrainingError(f"step 1: {explain(1, values, base.dtype)}")
        progress(number)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        corrected = average / (1 - SMOOTHING**number)
        if not math.isfinite(loss) or (smoothed and corrected > BLOWN_UP * min(smoothed)):
            break
        losses.append(loss)
        smoothed.append(corrected)
    if len(losses) < 10:
        raise TrainingError(f"the loss blew up at a rate of {rates[len(losses)]:.2g}; start lower than {low}")
    seen, lowest = rates[: len(losses)], int(np.argmin(smoothed))
    if lowest == 0:
        raise TrainingError(f"no rate from {low} to {seen[-1]:.2g} lowered the loss; start lower, or take more steps")
    fall, needed = _fall(np.asarray(losses), smoothed[lowest])
    if fall <= needed:
        raise TrainingError(
            f"the curve is too flat to choose from: from {low:g} to {seen[-1]:.2g} the loss fell by {fall:.3g}, and its"
            f" noise is {needed:.3g}. Try higher rates (--high), more steps (--rates) or larger batches"
        )
    return RangeTest(seen, np.asarray(losses), np.asarray(smoothed), float(seen[lowest]) / 10)


def _fall(losses: Float[np.ndarray, " N"], lowest: float) -> tuple[float, float]:
    """Returns how far the loss fell from its first tenth to its lowest moving average, and 3 standard errors of that.

    The deviation of a loss is estimated from the median difference between consecutive losses, so that neither a trend
    nor the end of the curve counts as noise.
    """
    first = max(3, len(losses) // 10)
    deviation = np.median(np.abs(np.diff(losses))) / (0.6745 * math.sqrt(2))
    error = deviation * math.sqrt(1 / first + (1 - SMOOTHING) / (1 + SMOOTHING))
    return float(losses[:first].mean() - lowest), float(3 * error)
