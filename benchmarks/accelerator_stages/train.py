"""Compares training steps of spt_jax and PEFT: tokens per second, peak memory, share of the device's peak.

Every configuration runs in a separate process. Both frameworks use the same weights and texts, and their first losses
must agree.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.rows import Row, run_rows

# Relative difference of the first losses: rounding of a mean over hundreds of tokens in bfloat16, the order of
# summation in float32.
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-4}


def ours(batch: int, attention: str, remat: str, method: str = "prompt", **more: Any) -> Row:
    options = {"batch": batch, "attention": attention, "remat": remat, "method": method}
    return Row(f"spt_jax {method} batch {batch} {attention} {remat}", "train_spt_jax", options, **more)


def peft(batch: int, method: str = "prompt", checkpointing: bool = False, **more: Any) -> Row:
    options = {"batch": batch, "method": method, "checkpointing": checkpointing}
    name = f"peft {method} batch {batch}" + (" checkpointing" if checkpointing else "")
    return Row(name, "train_peft", options, **more)


def planned(tiny: bool) -> list[Row]:
    """Returns all rows, the most important first."""
    if tiny:
        return [ours(4, "fused", "dots", needed=True), peft(4, needed=True)]
    first = [
        ours(32, "fused", "dots", needed=True),
        peft(32, needed=True),
        ours(4, "fused", "none", needed=True),
        peft(4, needed=True),
        peft(32, checkpointing=True),
        ours(32, "fused", "full"),
        ours(4, "fused", "dots", "prefix"),
        peft(4, "prefix"),
        ours(32, "xla", "dots"),
        ours(32, "fused", "none"),
    ]
    grid = [
        ours(batch, attention, remat)
        for batch in (4, 32)
        for attention in ("fused", "xla")
        for remat in ("none", "dots", "full")
    ]
    names = {row.name for row in first}
    return [*first, *(row for row in grid if row.name not in names), peft(4, checkpointing=True)]


def comparisons(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compares each row of spt_jax with PEFT's of the same method and batch size, without checkpointing."""
    found = {}
    for name, row in rows.items():
        other = rows.get(f"peft {row.get('method')} batch {row.get('batch')}", {})
        if row.get("framework") != "spt_jax" or "first_loss" not in row or "first_loss" not in other:
            continue
        found[name] = {"loss_difference": abs(row["first_loss"] / other["first_loss"] - 1)}
        for figure in ("tokens_per_second", "peak_bytes"):
            if row.get(figure) and other.get(figure):
                found[name][f"{figure}_ratio"] = row[figure] / other[figure]
    return found


def run(task: Task, record: Record) -> None:
    """Measures the rows, compares them, and checks that the frameworks compute the same losses."""

    def after(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {"comparisons": comparisons(rows), **device.of_first(rows)}

    run_rows(planned(task.tiny), task, record, environment=device.memory_settings(), after=after)
    tolerance = TOLERANCE["float32" if task.tiny else "bfloat16"]
    apart = {
        name: one["loss_difference"]
        for name, one in record.content["comparisons"].items()
        if not one["loss_difference"] <= tolerance
    }
    record.update(summary=summary(record.content))
    if apart:
        error = f"first losses differ from PEFT's by more than {tolerance}: {apart}"
        record.update(status="failed", error="; ".join(filter(None, [error, record.content.get("error")])))


def summary(content: Mapping[str, Any]) -> str:
    """Returns one line of figures."""
    parts = []
    for name, row in content["rows"].items():
        if row["status"] != "passed" or row.get("framework") != "spt_jax" or row.get("method") != "prompt":
            continue
        against = content["comparisons"].get(name, {})
        ratios = [
            f"{against[key]:.2f} x PEFT's {word}"
            for key, word in (("tokens_per_second_ratio", "tokens/s"), ("peak_bytes_ratio", "peak memory"))
            if key in against
        ]
        parts.append(
            f"batch {row['batch']} {row['attention']} {row['remat']}: {row['tokens_per_second']:,.0f} tokens/s,"
            f" {row['utilization']:.0%} of peak" + "".join(f", {ratio}" for ratio in ratios)
        )
    return "; ".join(parts[:2])
