"""When a prompt is long enough: means over seeds, their standard errors, and two rules based on them.

A length is an improvement if its mean exceeds that of the last improvement by more than the standard error of their
difference, sqrt(a^2 + b^2) for standard errors a and b. All lengths are evaluated on the same records, so the true
standard error is smaller; the rule therefore errs towards stopping early and towards short prompts. A sweep stops after
a number of lengths in a row without an improvement. It chooses the shortest length whose mean is within one standard
error of the highest (the one-standard-error rule of Breiman et al. 1984, section 3.4.3).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spt_jax.errors import ConfigError

Z95 = 1.959964  # 97.5 % quantile of the standard normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the bounds of the values."""

    mean: float
    standard_error: float
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean, under a normal distribution, within the bounds."""
        half, (lowest, highest) = Z95 * self.standard_error, self.bounds
        return max(self.mean - half, lowest), min(self.mean + half, highest)

    def as_json(self) -> dict[str, float | tuple[float, float]]:
        """Returns mean, standard error and interval."""
        return {"mean": self.mean, "standard_error": self.standard_error, "interval": self.interval}


def estimates(
    settings: Sequence[Float[np.ndarray, "R N"]], bounds: tuple[float, float] = (-math.inf, math.inf)
) -> list[Estimate]:
    """Returns the mean and standard error of each setting's values, from R seeds on the same N records.

    The mean varies with the seed and with the choice of records. The variance between seeds is pooled over all
    settings, because a few seeds give a poor estimate; it is taken as 0 if each setting has only one seed.

    Args:
      settings: the values of each setting.
      bounds: the lowest and the highest possible value.
    """
    deviations = [values.mean(axis=1) - values.mean() for values in settings]
    freedom = sum(len(deviation) - 1 for deviation in deviations)
    between = float(sum((deviation**2).sum() for deviation in deviations)) / max(1, freedom)
    found = []
    for values in settings:
        runs, records = values.shape
        within = float(values.mean(axis=0).var(ddof=1)) / records if records > 1 else math.inf
        found.append(Estimate(float(values.mean()), math.sqrt(between / runs + within), bounds))
    return found


def has_plateaued(ascending: Sequence[Estimate], patience: int) -> bool:
    """Whether the last `patience` lengths were no improvement."""
    last, since = ascending[0], 0
    for estimate in ascending[1:]:
        if estimate.mean - last.mean > math.hypot(estimate.standard_error, last.standard_error):
            last, since = estimate, 0
        else:
            since += 1
    return since >= patience


def shortest_of_the_best(ascending: Sequence[Estimate]) -> int:
    """Returns the index of the first estimate within one standard error of the highest."""
    best = max(ascending, key=lambda estimate: estimate.mean)
    return next(n for n, estimate in enumerate(ascending) if estimate.mean >= best.mean - best.standard_error)


def check_records(records: int, resolution: float) -> None:
    """Checks that an accuracy over this number of records can show a difference of `resolution`.

    Its standard error is sqrt(p (1 - p) / N), at most 0.5 / sqrt(N).

    Raises:
      ConfigError: there are too few records; the message has the number needed.
    """
    if not 0 < resolution < 1:
        raise ConfigError(f"--resolution is {resolution}; it is a difference in accuracy, between 0 and 1")
    needed = math.ceil(0.25 / resolution**2 - 1e-9)
    if records < needed:
        raise ConfigError(
            f"{records} validation records are too few to see a plateau: their accuracy has a standard error of up to"
            f" {0.5 / math.sqrt(records):.3f}, more than the smallest difference that matters, {resolution}"
            f" (--resolution). Give at least {needed} records, or train every length with --over method.length=..."
        )
