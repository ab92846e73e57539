"""Makes the report of a work directory from its files; no base is loaded."""

import json
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError
from spt_jax.experiment.workdir import CONFIG_FILE
from spt_jax.reports.comparison_report import comparison_report
from spt_jax.reports.contents import Report
from spt_jax.reports.run_report import run_report
from spt_jax.reports.sweep_report import sweep_report
from spt_jax.runtime.files import nearest_path


def read_report(workdir: Path) -> Report:
    """Returns the report of a run, a sweep or a comparison.

    Args:
      workdir: the work directory; it must have been finished.

    Raises:
      ConfigError: there is none, or it is unfinished or damaged.
      CheckpointError, DataError: the metrics or the predictions are damaged.
    """
    config = _json(workdir / CONFIG_FILE)
    if (workdir / "compare.json").exists():
        return comparison_report(workdir, config.get("config", config), _json(workdir / "compare.json"))
    kind = sweep_report if "sweep" in config else run_report
    return kind(workdir, config, _json(workdir / "results.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {path}, so {path.parent} is not the work directory of a finished run, sweep or comparison"
            f"{nearest_path(path.parent)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    return found
