"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spt_jax.config import LogConfig
from spt_jax.errors import ConfigError
from spt_jax.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsLog:
    """Appends a line per event. Opened at a resumed step, it drops what a killed run wrote beyond that step."""

    def __init__(self, workdir: Path, config: LogConfig, *, from_step: int, run_config: Mapping[str, Any]):
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= from_step] if from_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            self._tensorboard = _tensorboard(workdir, from_step)
        if config.wandb:
            self._wandb = _wandb(config.wandb, workdir, run_config, resumed=from_step > 0)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line {"step": step, ...}; nested mappings become names with a slash outside the file."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        flat = {name: value for name, value in _flat(values) if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        """Flushes and closes every destination."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLog(MetricsLog):
    """For the processes of a run that do not write."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _tensorboard(workdir: Path, from_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ConfigError("log.tensorboard needs the extra: pip install 'spt_jax[tensorboard]'") from error
    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=from_step or None)


def _wandb(project: str, workdir: Path, run_config: Mapping[str, Any], resumed: bool) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("log.wandb needs the extra: pip install 'spt_jax[wandb]'") from error
    return wandb.init(
        project=project, dir=str(workdir), config=dict(run_config), id=workdir.name, resume="allow" if resumed else None
    )
