"""Writes `report.html`: one file that needs no other file and no network."""

import dataclasses
import functools
from importlib import resources
from pathlib import Path

import jinja2

from spt_jax.reports.contents import Report
from spt_jax.reports.from_workdir import read_report
from spt_jax.runtime.files import write_text

REPORT_FILE = "report.html"


@functools.cache
def _template() -> jinja2.Template:
    source = (resources.files("spt_jax") / "assets" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def render(report: Report) -> str:
    """Returns a report as an HTML page. Every text is escaped."""
    parts = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return _template().render(parts)


def write_report(workdir: Path) -> Path:
    """Writes `report.html` into the work directory of a finished run, sweep or comparison, from its files.

    Raises:
      ConfigError, CheckpointError, DataError: as in `read_report`.
      WriteError: the file cannot be written.
    """
    path = workdir / REPORT_FILE
    # Lone surrogates, which JSON can hold and UTF-8 cannot, become question marks.
    write_text(path, render(read_report(workdir)).encode("utf-8", "replace").decode())
    return path
