"""Compares serving the bare base, and 1 to 1,000 prompts at once, with PEFT's `generate` of one prompt in one batch."""

from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.rows import Row, run_rows

ROWS = (
    Row("spt_jax", "serve_spt_jax", {}, seconds=45, limit=240, needed=True),
    Row("peft", "serve_peft", {}, seconds=20, limit=60, needed=True),
)
# Seconds that the first row leaves for the second.
PEFT_SECONDS = 25


def run(task: Task, record: Record) -> None:
    """Measures both rows and their ratio."""

    def after(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        ours, theirs = (rows.get(name, {}).get("tokens_per_second") for name in ("spt_jax", "peft"))
        found = device.of_first(rows)
        return found | ({"ratio_to_peft": ours["1"] / theirs} if ours and "1" in ours and theirs else {})

    leave = 0 if task.tiny else PEFT_SECONDS
    rows = [
        Row(row.name, row.module, {"leave": leave if row.name == "spt_jax" else 0}, row.seconds, row.limit, row.needed)
        for row in ROWS
    ]
    run_rows(rows, task, record, environment=device.memory_settings(), after=after)
    own = record.content["rows"]["spt_jax"]
    if own.get("tokens_per_second"):
        rates = ", ".join(f"{name} prompts {rate:,.0f}" for name, rate in own["tokens_per_second"].items())
        against = f"; {record.content['ratio_to_peft']:.2f} x PEFT's" if "ratio_to_peft" in record.content else ""
        record.update(summary=f"tokens/s with {rates}{against}")
