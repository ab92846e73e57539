"""`spt-jax report`: writes the report of a work directory again, from its files."""

import dataclasses
from pathlib import Path

import tyro

from spt_jax.reports.html import write_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeReport:
    """Writes report.html of a finished run, sweep or comparison again, from the files of its work directory.

    Attributes:
      workdir: the work directory.
    """

    workdir: tyro.conf.Positional[Path]

    def run(self) -> None:
        print(write_report(self.workdir))
