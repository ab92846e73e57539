"""Logs of trials that train together: one `metrics.jsonl`, and for each trial its own runs elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.training.config import LogConfig
from spt_jax.training.logs import MetricsLog, Trackers


class PopulationLog(MetricsLog):
    """Writes the lines of all trials to one file, and the values of each trial to its own trackers.

    A trial that has no more values, because it was stopped or had ended before a resumed run, opens no trackers.
    """

    def __init__(self, folder: Path, trackers: Sequence[Callable[[], Trackers]], *, from_step: int):
        """Opens the file.

        Args:
          folder: the directory of `metrics.jsonl`.
          trackers: opens the trackers of each trial, in the order of the population.
          from_step: the step from which the run starts or resumes.
        """
        super().__init__(folder, LogConfig(), from_step=from_step, run_config={})
        self._open = trackers
        self._opened: dict[int, Trackers] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line; its values by the numbers of trials are also written to the trackers of these."""
        super().write(step, values)
        for number, own in by_trial(values).items():
            if number not in self._opened:
                self._opened[number] = self._open[number]()
            self._opened[number].write(step, own)

    def close(self) -> None:
        """Flushes and closes the file and all trackers."""
        super().close()
        for tracker in self._opened.values():
            tracker.close()


def by_trial(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the values of each trial, from those of a line by the names of metrics.

    Args:
      values: for each name the values by the numbers of trials, or one value of all trials together, which is left out.
    """
    found: dict[int, dict[str, Any]] = {}
    for name, by_number in values.items():
        if isinstance(by_number, Mapping):
            for number, value in by_number.items():
                found.setdefault(int(number), {})[name] = value
    return found
