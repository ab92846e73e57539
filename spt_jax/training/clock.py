"""The time and work of a run, and its progress bar."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from spt_jax.runtime import processes


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates per second. Compilation, which ends with the first step, validation and saving are excluded.

    Attributes:
      examples: examples per second.
      tokens: tokens per second, without padding and the leading tokens that examples share.
      utilization: the matrix operations that steps need (`cost.step_flops`), as a share of the peak of the devices
        (`measure.peak_flops`).
    """

    examples: float = 0.0
    tokens: float = 0.0
    utilization: float = 0.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time and work of a run since its first start, as stored in its checkpoints.

    Attributes:
      seconds: the training time, without validation and saving.
      warm_seconds: the part of it after the first step of each start, without compilation.
      examples, tokens, flops: the work done in `warm_seconds`, counted as in `Rates`.
    """

    seconds: float = 0.0
    warm_seconds: float = 0.0
    examples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def rates(self, peak_flops: float) -> Rates:
        """Returns the work per second.

        Args:
          peak_flops: the peak operations per second of all devices together.
        """
        if not self.warm_seconds:
            return Rates()
        examples, tokens, flops = (work / self.warm_seconds for work in (self.examples, self.tokens, self.flops))
        return Rates(examples, tokens, flops / peak_flops)


def progress_bar(steps: int, first: int, *, shown: bool = True) -> tqdm:
    """Returns a progress bar over the steps of a run, of which `first` are done; a hidden one if not `shown`."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0  # fewer lines in log files
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        mininterval=seconds,
        disable=not (shown and processes.leads()),
    )


class Clock:
    """The clock and the progress bar of one start of a run."""

    def __init__(self, steps: int, first: int, before: Speed, peak_flops: float, *, shown: bool = True):
        """Starts the clock.

        Args:
          steps: the steps of the whole run.
          first: the steps that were done before.
          before: the time and work of the earlier starts.
          peak_flops: the peak operations per second of all devices together.
          shown: whether to show the progress bar.
        """
        self.peak_flops = peak_flops
        self._before = before
        self._work = np.zeros(3)
        self._warm: float | None = None
        self._paused = 0.0
        self._started = time.perf_counter()
        self._bar = progress_bar(steps, first, shown=shown)

    @property
    def seconds(self) -> float:
        """Seconds since this start, without validation and saving."""
        return time.perf_counter() - self._started - self._paused

    @property
    def speed(self) -> Speed:
        """Time and work since the first start of the run."""
        seconds, before = self.seconds, self._before
        if self._warm is None or not self._work.any():
            return dataclasses.replace(before, seconds=before.seconds + seconds)
        examples, tokens, flops = map(float, self._work)
        return Speed(
            before.seconds + seconds,
            before.warm_seconds + seconds - self._warm,
            before.examples + examples,
            before.tokens + tokens,
            before.flops + flops,
        )

    def count(self, work: Float[np.ndarray, "3"]) -> None:
        """Counts the examples, tokens and operations of a step that is done. The first step includes compilation."""
        if self._warm is None:
            self._warm = self.seconds
        else:
            self._work += work

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside the context from the training time and the rates."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def show(self, losses: Sequence[float]) -> None:
        """Moves the progress bar by a step and shows the lowest of the members' losses, and the rates."""
        self._bar.update(1)
        rates = self.speed.rates(self.peak_flops)
        self._bar.set_postfix(
            {
                **({"loss": f"{min(losses):.3f}"} if losses else {}),
                "examples/s": f"{rates.examples:.0f}",
                "tokens/s": f"{rates.tokens:,.0f}",
                "of peak": f"{rates.utilization:.0%}",
            },
            refresh=False,
        )

    def close(self) -> None:
        """Closes the progress bar."""
        self._bar.close()
