"""When a prompt is long enough: means over seeds, their standard errors, and two rules that read them.

An improvement is a mean that lies above the last improvement's by more than the standard error of their difference,
sqrt(a^2 + b^2) for standard errors a and b. Lengths that answer the same records differ by less than this, so the rule
errs towards stopping, and towards short prompts. A sweep stops after some lengths in a row without one, and takes the
shortest length whose mean lies within one standard error of the highest (the one-standard-error rule of Breiman et al.
1984, section 3.4.3).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from spt_jax.errors import ConfigError

Z95 = 1.959964  # of a normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """In which the true mean lies with 95 %, were it normal."""
        return self.mean - Z95 * self.standard_error, self.mean + Z95 * self.standard_error

    def as_json(self) -> dict[str, float | tuple[float, float]]:
        """Mean, standard error and interval."""
        return {"mean": self.mean, "standard_error": self.standard_error, "interval": self.interval}


def estimates(settings: Sequence[Float[np.ndarray, "R N"]]) -> list[Estimate]:
    """The mean of each setting's values, R seeds at the same N records.

    Two things move it: the seed and the choice of records. The variance between seeds is taken to be that of all
    settings together, since a few seeds tell little about it; settings of one seed each tell nothing.
    """
    deviations = [values.mean(axis=1) - values.mean() for values in settings]
    freedom = sum(len(own) - 1 for own in deviations)
    between = float(sum((own**2).sum() for own in deviations)) / max(1, freedom)
    found = []
    for values in settings:
        runs, records = values.shape
        within = float(values.mean(axis=0).var(ddof=1)) / records if records > 1 else math.inf
        found.append(Estimate(float(values.mean()), math.sqrt(between / runs + within)))
    return found


def has_plateaued(ascending: Sequence[Estimate], patience: int) -> bool:
    """Whether the last `patience` lengths brought no improvement."""
    last, since = ascending[0], 0
    for estimate in ascending[1:]:
        if estimate.mean - last.mean > math.hypot(estimate.standard_error, last.standard_error):
            last, since = estimate, 0
        else:
            since += 1
    return since >= patience


def shortest_of_the_best(ascending: Sequence[Estimate]) -> int:
    """The place of the first estimate within one standard error of the highest."""
    best = max(ascending, key=lambda estimate: estimate.mean)
    return next(n for n, own in enumerate(ascending) if own.mean >= best.mean - best.standard_error)


def check_records(records: int, resolution: float) -> None:
    """Whether an accuracy over so many records can show a difference of `resolution`.

    Its standard error is sqrt(p (1 - p) / N), at most 0.5 / sqrt(N).

    Raises:
      ConfigError: it cannot, with the number of records that could.
    """
    if not 0 < resolution < 1:
        raise ConfigError(f"--resolution is {resolution}; it is a difference in accuracy, between 0 and 1")
    needed = math.ceil(0.25 / resolution**2 - 1e-9)
    if records < needed:
        raise ConfigError(
            f"{records} validation records are too few to see a plateau: their accuracy has a standard error of up to"
            f" {0.5 / math.sqrt(records):.3f}, more than the difference of {resolution} that matters (--resolution)."
            f" {needed} records would do"
        )
