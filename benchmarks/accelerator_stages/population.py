"""Measures one step of 1, 8 and 32 prompts, each with a batch of 8, against the same number of steps of one prompt."""

from collections.abc import Mapping
from typing import Any

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.rows import Row, run_rows


def row(members: int, remat: str, one_by_one: bool = False, **more: Any) -> Row:
    options = {"members": members, "remat": remat, "one_by_one": one_by_one}
    return Row(f"{members} {remat}", "population_spt_jax", options, seconds=25, limit=120, **more)


def planned(tiny: bool) -> list[Row]:
    """Returns all rows, the most important first.

    The first row also measures one prompt. The less is recomputed, the more memory 32 prompts need.
    """
    if tiny:
        return [row(2, "dots", True, needed=True)]
    return [row(8, "dots", True, needed=True), row(32, "full"), row(8, "full", True), row(32, "dots")]


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds of a population's step by those of its members one by one, at the best speed of any row."""
    single = [own["one_step_seconds"] for own in rows.values() if own.get("one_step_seconds")]
    done = {name: own for name, own in rows.items() if own.get("step_seconds")}
    return {name: own["step_seconds"] / (own["members"] * min(single)) for name, own in done.items() if single}


def run(task: Task, record: Record) -> None:
    """Runs each row in a separate process."""

    def after(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {"ratios": ratios(rows), **device.of_first(rows)}

    run_rows(planned(task.tiny), task, record, environment=device.memory_settings(), after=after)
    parts = [f"{name}: {ratio:.2f} of one by one" for name, ratio in record.content["ratios"].items()]
    record.update(summary="; ".join(parts))
