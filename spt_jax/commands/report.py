"""`spt-jax report`: writes the report of a work directory again, from its files."""

from spt_jax.commands.options import MakeReport
from spt_jax.reports.html import write_report


def make_report(options: MakeReport) -> None:
    """Writes the report of a work directory again, and prints its path."""
    print(write_report(options.workdir))
