"""Measurements of a stage that each run in a separate process, in turn, until the time is used up."""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accelerator_stages.process import Record, Task, failures, run_process

_RESERVE_SECONDS = 3.0  # for what a stage does after its last row


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: of the row.
      module: name of the module in this package that measures it.
      options: of the module.
      seconds: the least time that it takes on an accelerator; it does not start with less.
      limit: seconds after which it is killed, so that a hanging row leaves time for others.
      needed: whether the stage fails without it; running out of memory counts as a result.
    """

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 20.0
    limit: float = 120.0
    needed: bool = False


def run_rows(
    rows: Sequence[Row],
    task: Task,
    record: Record,
    *,
    environment: Mapping[str, str],
    after: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]] = lambda rows: {},
) -> None:
    """Measures rows in order, and sets the stage's status.

    Args:
      rows: the most important first.
      task, record: the stage's.
      environment: environment variables of the rows' processes.
      after: computes fields of the record from the rows so far.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            left = task.left - _RESERVE_SECONDS
            least, seconds = (0.0, left) if task.tiny else (row.seconds, min(left, row.limit))
            if seconds < least:
                found[row.name] = {"status": "not measured", "error": f"{seconds:.0f} s were left"}
            else:
                log = Path(folder) / "log"
                found[row.name] = run_process(
                    f"{__package__}.{row.module}",
                    Path(folder) / "row.json",
                    seconds=seconds,
                    tiny=task.tiny,
                    log=log,
                    options=row.options,
                    environment=environment,
                )
                sys.stderr.write(f"--- {row.name}: {found[row.name]['status']}\n{log.read_text(errors='replace')}")
                sys.stderr.flush()
                log.unlink()
            record.put("rows", row.name, found[row.name])
            record.update(**after(found))
    needed = {row.name: found[row.name] for row in rows if row.needed}
    fine = ("passed", "skipped", "out of memory")
    bad = failures(needed, fine) + failures(
        {row.name: found[row.name] for row in rows if not row.needed}, (*fine, "not measured", "out of time")
    )
    record.update(not_measured=failures(found, fine))
    if bad:
        reasons = "; ".join(f"{name}: {found[name]['status']}: {found[name].get('error', '')[:300]}" for name in bad)
        record.update(status="failed", error=reasons)
