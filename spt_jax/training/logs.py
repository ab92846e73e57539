"""Logs the metrics of a run to `metrics.jsonl` and, on request, to TensorBoard and Weights & Biases.

`wandb-id` in the work directory holds the id of its run on Weights & Biases, so that a resumed run continues it.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spt_jax.errors import CheckpointError
from spt_jax.runtime.extras import check_installed, load_extra
from spt_jax.runtime.files import changed, write_text, writing
from spt_jax.runtime.progress import say
from spt_jax.runtime.waits import spoken
from spt_jax.training.config import LogConfig

_WANDB_ID = "wandb-id"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`. A last line that was cut short when the run was killed is skipped.

    Raises:
      CheckpointError: another line is not a JSON object with a step.
    """
    content = path.read_bytes().split(b"\n") if path.exists() else []
    lines = []
    for number, line in enumerate(content, 1):
        try:
            values = json.loads(line)
            lines.append({**values, "step": int(values["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if number == len(content):
                break
            raise CheckpointError(
                f"{path}, line {number}, is damaged ({error}): delete that line, or the file, which only holds metrics"
            ) from error
    return lines


def check_log(config: LogConfig) -> None:
    """Checks that the packages of all destinations are installed.

    Raises:
      ConfigError: one is not; the message names the extra.
    """
    if config.tensorboard:
        check_installed("tensorboardX", "log.tensorboard")
    if config.wandb:
        check_installed("wandb", "log.wandb")


def shortest(values: Float[np.ndarray, " N"]) -> list[float]:
    """Returns float32 numbers as those with the fewest digits that are rounded to them, such as 0.1."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What Weights & Biases is told about a run.

    Attributes:
      config: the config as plain JSON.
      name: the name of the run; None for the name of its work directory.
      group: the runs that it belongs to, such as those of a sweep; None for a run of its own.
    """

    config: Mapping[str, Any]
    name: str | None = None
    group: str | None = None


class Trackers:
    """The destinations of a run's metrics besides `metrics.jsonl`: TensorBoard and Weights & Biases, if requested."""

    def __init__(self, workdir: Path, config: LogConfig, info: RunInfo, *, from_step: int):
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            self._tensorboard = _tensorboard(workdir, from_step)
        if config.wandb:
            self._wandb = _wandb(config.wandb, workdir, info)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of a step; nested mappings are flattened to names with slashes."""
        numbers = {name: value for name, value in _flat(values) if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes every destination."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class MetricsLog:
    """Appends one line per event: the metrics of a step, with its learning rate and tokens per second, or a validation.

    When it is opened to resume from a step, it deletes the lines that the killed run wrote after that step.
    """

    def __init__(self, workdir: Path, config: LogConfig, *, from_step: int, run_config: Mapping[str, Any]):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= from_step] if from_step else []
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._trackers = Trackers(workdir, config, RunInfo(run_config), from_step=from_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the line {"step": step, ...}."""
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._trackers.write(step, values)

    def sync(self) -> None:
        """Flushes all lines to disk, so that they survive a power failure like the checkpoint saved after them."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        changed(self._path)

    def close(self) -> None:
        """Flushes and closes every destination."""
        with writing(self._path):
            self._file.close()
        self._trackers.close()


class NoLog(MetricsLog):
    """A log that writes nothing, for the processes of a run other than the first."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def publish(
    workdir: Path,
    config: LogConfig,
    *,
    info: RunInfo,
    results: Mapping[str, Any],
    prompt: Path | None,
) -> None:
    """Adds the results and the prompt of a finished run to its run on Weights & Biases, if it is logged there.

    Args:
      workdir: the work directory of the run.
      config: where metrics are logged.
      info: what Weights & Biases is told about the run.
      results: metrics for the summary; nested mappings are flattened to names with slashes.
      prompt: the directory of the saved prompt, which becomes an artifact of type "prompt"; None if there is none.

    A failure of Weights & Biases is said, and not raised: the run is finished and saved.
    """
    if not config.wandb:
        return
    wandb = load_extra("wandb", "log.wandb")
    with spoken("sending the results to Weights & Biases"):
        try:
            _publish(wandb, _wandb(config.wandb, workdir, info), workdir, results, prompt)
        except Exception as error:  # of any kind, as of the network; the run itself is finished and saved
            say(f"the results were not sent to Weights & Biases: {type(error).__name__}: {error}")


def _publish(wandb: Any, run: Any, workdir: Path, results: Mapping[str, Any], prompt: Path | None) -> None:
    run.summary.update({name: value for name, value in _flat(results) if isinstance(value, (int, float, str))})
    if prompt is not None:
        artifact = wandb.Artifact(f"prompt-{run_id(workdir)}", type="prompt")
        artifact.add_dir(str(prompt))
        run.log_artifact(artifact)
    run.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _tensorboard(workdir: Path, from_step: int) -> Any:
    tensorboardX = load_extra("tensorboardX", "log.tensorboard")
    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=from_step or None)


def _wandb(project: str, workdir: Path, info: RunInfo) -> Any:
    wandb = load_extra("wandb", "log.wandb")
    return wandb.init(
        project=project,
        dir=str(workdir),
        config=dict(info.config),
        name=info.name or workdir.name,
        group=info.group,
        id=run_id(workdir),
        resume="allow",
        # The trials of a sweep that train together are several runs of one process.
        reinit="create_new",
    )


def run_id(workdir: Path) -> str:
    """Returns an id that is unique to a work directory and is reused when its run is resumed."""
    path = workdir / _WANDB_ID
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text()
