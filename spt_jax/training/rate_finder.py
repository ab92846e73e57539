"""A learning rate by a range test: one short run whose rate rises from step to step (Smith 2015, arXiv 1506.01186)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import place_batch, training_batches
from spt_jax.errors import ConfigError, TrainingError
from spt_jax.training.optimizers import OptimizerConfig
from spt_jax.training.overflow import explain
from spt_jax.training.population import Member, init_members, make_population_step, stack_batches
from spt_jax.training.step import Objective

SMOOTHING = 0.9
MAX_STEPS = 100_000
BLOWN_UP = 4.0  # times the lowest smoothed loss


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What came of each rate until the loss blew up.

    rates, losses: of every step.
    smoothed: the losses' exponential mean, in which the weights of the first steps are made up for.
    suggested: a tenth of the rate at which the smoothed loss is lowest: beyond it, the rate begins to do harm.
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
    low: float = 1e-4,
    high: float = 10.0,
    steps: int = 100,
    progress: Callable[[int], Any] = lambda step: None,
) -> RangeTest:
    """Trains one prompt at rates that rise geometrically from `low` to `high`, and stops where the loss blows up.

    Args:
      member: method, data and seed; its own rate is not used.
      optimizer: resolved; its schedule is not used.
      progress: called after every step.

    Raises:
      ConfigError: the range is empty, or has fewer than 10 steps or more than `MAX_STEPS`.
      TrainingError: the loss blew up within 10 steps, or never fell by more than its noise.
    """
    if not 0 < low < high < math.inf or not 10 <= steps <= MAX_STEPS:
        raise ConfigError(
            f"a range test goes up from a rate above 0, in 10 to {MAX_STEPS:,} steps; not {low} to {high} in {steps}"
        )
    optimizer = dataclasses.replace(optimizer, schedule="constant", warmup_steps=0)
    states = init_members(base, [member], optimizer, steps)
    step = make_population_step(base, member.method, optimizer, steps, objective)
    stream = training_batches(
        member.examples, member.plan, batch_size=batch_size, seed=member.seed, class_weights=member.class_weights
    )
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    smoothed: list[float] = []
    mean = 0.0
    for number, rate in enumerate(rates, 1):
        batch = place_batch(stack_batches([next(stream)]), base.mesh, stacked=True)
        states, metrics = step(states, np.asarray([rate], np.float32), batch)
        values = {name: float(value[0]) for name, value in jax.device_get(metrics).items()}
        loss = values["loss"]
        if number == 1 and not math.isfinite(loss):
            raise TrainingError(f"step 1: {explain(1, values, base.dtype)}")
        progress(number)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        now = mean / (1 - SMOOTHING**number)
        if not math.isfinite(loss) or (smoothed and now > BLOWN_UP * min(smoothed)):
            break
        losses.append(loss)
        smoothed.append(now)
    if len(losses) < 10:
        raise TrainingError(f"the loss blew up at a rate of {rates[len(losses)]:.2g}; begin lower than {low}")
    seen, lowest = rates[: len(losses)], int(np.argmin(smoothed))
    if lowest == 0:
        raise TrainingError(f"no rate from {low} to {seen[-1]:.2g} lowered the loss; begin lower, or take more steps")
    fall, needed = _fall(np.asarray(losses), smoothed[lowest])
    if fall <= needed:
        raise TrainingError(
            f"the curve is too flat to choose from: from {low:g} to {seen[-1]:.2g} the loss fell by {fall:.3g}, and its"
            f" noise is {needed:.3g}. Go to higher rates (--high), or take more steps (--rates) or larger batches"
        )
    return RangeTest(seen, np.asarray(losses), np.asarray(smoothed), float(seen[lowest]) / 10)


def _fall(losses: Float[np.ndarray, " N"], lowest: float) -> tuple[float, float]:
    """How far the loss fell from its first tenth to its lowest exponential mean, and three standard errors of that.

    The deviation of one loss is taken from the differences between neighbours, by their median, so that neither a trend
    nor the end of the curve counts as noise.
    """
    first = max(3, len(losses) // 10)
    deviation = np.median(np.abs(np.diff(losses))) / (0.6745 * math.sqrt(2))
    error = deviation * math.sqrt(1 / first + (1 - SMOOTHING) / (1 + SMOOTHING))
    return float(losses[:first].mean() - lowest), float(3 * error)
