"""Targets for an H100 or H200, and whether the measurements meet them."""

from collections.abc import Iterator, Mapping
from typing import Any

# By name: the limit of a figure, and whether it is the minimum (True) or the maximum (False).
LIMITS: dict[str, tuple[float, bool]] = {
    "batch 4: tokens/s of PEFT's": (1.35, True),
    "batch 32: tokens/s of PEFT's": (1.6, True),
    "batch 32: peak memory of PEFT's": (0.45, False),
    "batch 32: share of the measured peak": (0.45, True),
    "batch 32: full rematerialisation's peak memory of PEFT's with checkpointing": (1.0, False),
    "1,000 prompts: tokens/s of one prompt's": (0.98, True),
    "1,000 prompts: tokens/s of the bare base's": (0.95, True),
    "a population of 8: time of eight runs": (0.4, False),
}
_Figures = dict[str, tuple[float, str]]


def targets(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns every target with its limit, the measured value, the measured configuration, and whether it is met.

    The targets of one batch size are all measured on one configuration: the one that meets most of them, the fastest
    of equals. Measurements on a CPU are ignored.

    Args:
      stages: the stages' records by name.
    """
    found: _Figures = {}
    for name, figures in (("train", _train), ("serve", _serve), ("population", _population)):
        if stages.get(name, {}).get("platform") not in (None, "cpu"):
            found |= figures(stages[name])
    return {name: _target(name, found.get(name)) for name in LIMITS}


def _target(name: str, measured: tuple[float, str] | None) -> dict[str, Any]:
    limit, least = LIMITS[name]
    wanted = {"at least" if least else "at most": limit}
    if measured is None:
        return {**wanted, "measured": None, "of": None, "met": None}
    return {**wanted, "measured": measured[0], "of": measured[1], "met": _met(name, measured[0])}


def _met(name: str, value: float) -> bool:
    limit, least = LIMITS[name]
    return value >= limit if least else value <= limit


def _train(stage: Mapping[str, Any]) -> _Figures:
    rows, found = stage.get("rows", {}), {}
    for batch in (4, 32):
        ways = list(_configurations(stage, batch))
        if ways:
            _, best = max(ways, key=lambda way: (sum(_met(name, one[0]) for name, one in way[1].items()), way[0]))
            found |= best
    full, theirs = (
        rows.get("spt_jax prompt batch 32 fused full", {}),
        rows.get("peft prompt batch 32 checkpointing", {}),
    )
    if full.get("peak_bytes") and (other := _peak(stage, theirs)):
        name = "batch 32: full rematerialisation's peak memory of PEFT's with checkpointing"
        found[name] = full["peak_bytes"] / other[0], f"fused full{other[1]}"
    return found


def _configurations(stage: Mapping[str, Any], batch: int) -> Iterator[tuple[float, _Figures]]:
    """Yields the tokens per second and the figures of each measured configuration of this library."""
    rows = stage.get("rows", {})
    theirs = rows.get(f"peft prompt batch {batch}", {})
    for row in rows.values():
        ours = row.get("framework") == "spt_jax" and row.get("method") == "prompt" and row.get("batch") == batch
        if not ours or not row.get("tokens_per_second"):
            continue
        of, figures = f"{row['attention']} {row['remat']}", {}
        if theirs.get("tokens_per_second"):
            figures[f"batch {batch}: tokens/s of PEFT's"] = row["tokens_per_second"] / theirs["tokens_per_second"], of
        if batch == 32 and row.get("utilization"):
            figures["batch 32: share of the measured peak"] = row["utilization"], of
        if batch == 32 and (other := _peak(stage, theirs)):
            figures["batch 32: peak memory of PEFT's"] = row["peak_bytes"] / other[0], of + other[1]
        if figures:
            yield row["tokens_per_second"], figures


def _peak(stage: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Returns a row's peak memory. A row that ran out of memory needed at least the memory of the device."""
    if row.get("status") == "out of memory":
        return (stage["memory_bytes"], ", PEFT ran out of memory") if stage.get("memory_bytes") else None
    return (row["peak_bytes"], "") if row.get("tokens_per_second") and row.get("peak_bytes") else None


def _serve(stage: Mapping[str, Any]) -> _Figures:
    row = stage.get("rows", {}).get("spt_jax", {})
    shares = {
        "1,000 prompts: tokens/s of one prompt's": row.get("share_of_one_prompt", {}).get("1000"),
        "1,000 prompts: tokens/s of the bare base's": row.get("share_of_the_base", {}).get("1000"),
    }
    return {name: (value, "median of the rounds") for name, value in shares.items() if value}


def _population(stage: Mapping[str, Any]) -> _Figures:
    ways = {name: ratio for name, ratio in stage.get("ratios", {}).items() if name.startswith("8 ")}
    if not ways:
        return {}
    fastest = min(ways, key=lambda name: ways[name])
    return {"a population of 8: time of eight runs": (ways[fastest], fastest)}
