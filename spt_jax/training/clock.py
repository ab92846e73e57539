"""The time and work of a run, and its progress bar."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.runtime.progress import Progress, say


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


class Clock:
    """The clock and the progress of one start of a run."""

    def __init__(self, steps: int, first: int, before: Speed, peak_flops: float, *, shown: bool = True):
        """Starts the clock.

        Args:
          steps: the steps of the whole run.
          first: the steps that were done before.
          before: the time and work of the earlier starts.
          peak_flops: the peak operations per second of all devices together.
          shown: whether to show the progress.
        """
        self.peak_flops = peak_flops
        self._before = before
        self._work = np.zeros(3)
        self._warm: float | None = None
        self._counted = self._paused = 0.0
        self._started = time.perf_counter()
        self.tokens_per_second: float | None = None  # of the last step; None for the first one of a start
        self.progress = Progress("training", steps, first, unit="step", shown=shown)

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
        seconds, before = self.seconds, self._counted
        if self._warm is None:
            self._warm = seconds
        else:
            self._work += work
            self.tokens_per_second = round(float(work[1]) / max(seconds - before, 1e-9), 1)
        self._counted = seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside the context from the training time and the rates."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def show(self, losses: Sequence[float]) -> None:
        """Moves the progress by a step and shows the lowest of the members' losses, and the rates."""
        loss = [f"loss {min(losses):.3f}"] if losses else []
        self.progress.advance(note=", ".join([*loss, *self._rates()]))

    def say_validated(self, step: int, metrics: Sequence[Mapping[str, Any]], best: Mapping[str, Any], at: int) -> None:
        """Says the result of a validation in a line.

        Args:
          step: the number of steps done.
          metrics: the metrics of each member that was validated.
          best: the best metrics so far of any member.
          at: the step that they are from.
        """
        if self.progress.shown:
            say("; ".join([validation_line(step, metrics, best, at), *self._rates()[:1]]))

    def _rates(self) -> list[str]:
        rates = self.speed.rates(self.peak_flops)
        return [f"{rates.tokens:,.0f} tokens/s", f"{rates.utilization:.0%} of peak"] if rates.tokens else []

    def close(self) -> None:
        """Ends the progress."""
        self.progress.close()


def validation_line(step: int, metrics: Sequence[Mapping[str, Any]], best: Mapping[str, Any], at: int) -> str:
    """Returns a line on a validation, such as "step 40: validation accuracy 0.750, loss 0.512 (best 0.800 at step 20)".

    With reward functions, it shows the mean reward. For pairs of answers, it also shows the win rate, the reward margin
    and the KL divergence to the base; for a text to agree with, the agreement and the KL divergence from it.

    Of several members, it shows the lowest and the highest accuracy, or loss if there is none. The arguments are those
    of `Clock.say_validated`.
    """
    name = next((own for own in ("reward", "accuracy") if own in best), "loss")
    values = sorted(own[name] for own in metrics)
    if len(metrics) == 1:
        loss = f", loss {metrics[0]['loss']:.3f}" if name != "loss" else ""
        known = ("win_rate", "reward_margin", "kl_to_base", "agreement", "kl_to_text")
        further = (own for own in known if own in metrics[0])
        more = "".join(f", {own.replace('_', ' ')} {metrics[0][own]:.3f}" for own in further)
        result = f"validation {name} {values[0]:.3f}{loss}{more}"
    else:
        result = f"validation {name} of {len(metrics)} trials {values[0]:.3f} to {values[-1]:.3f}"
    return f"step {step}: {result} (best {best[name]:.3f} at step {at})"
