"""Checks that the device computes the same as the CPU.

The checks cover every family and method, fused attention, int8, generation, serving, populations, and a killed run that
is resumed. They run in threads, because most of the time is compilation and XLA can compile several programs at once.
Each check is recorded when it ends.
"""

import concurrent.futures
import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Skip, Task, failures

_RESERVE_SECONDS = 2.0
_MOST_THREADS = 12


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: a function that returns measured differences, and the bounds that these must stay within."""

    name: str
    function: Callable[[], Mapping[str, float]]
    bounds: Mapping[str, float]


def planned(tiny: bool) -> list[Check]:
    """Returns all checks, the most important first; if `tiny`, one of each kind."""
    from benchmarks.accelerator_stages import right_attention, right_models, right_serving
    from spt_jax.prompts import METHODS
    from spt_jax.testing import FAMILIES

    families = ("llama",) if tiny else FAMILIES
    methods = ("prefix_tuning",) if tiny else tuple(METHODS)

    engine = functools.partial(right_serving.engine, ("front",)) if tiny else right_serving.engine

    def of_families(dtype: str) -> list[Check]:
        return [
            Check(
                f"{family} {dtype} {'packed' if packing else 'padded'}",
                functools.partial(right_models.family, family, dtype, packing),
                right_models.BOUNDS[dtype],
            )
            for family in families
            for packing in ((True,) if tiny and dtype == "bfloat16" else (True, False))
        ]

    return [
        Check("a killed run resumes bit for bit", right_serving.resume, {"differing_numbers": 0}),
        *of_families("float32"),
        *(
            Check(
                f"attention: {case}",
                functools.partial(right_attention.attention, case),
                right_attention.BOUNDS,
            )
            for case in right_attention.CASES
        ),
        Check("attention: whole model", right_attention.model, right_models.BOUNDS["bfloat16"]),
        *(
            Check(f"method {name}", functools.partial(right_models.method, name), right_models.BOUNDS["float32"])
            for name in methods
        ),
        Check("generation", right_serving.generation, {"differing_answers": 0, "log_probabilities": 1e-3}),
        Check("engine", engine, {"differing_answers": 0, "log_probabilities": 1e-3}),
        Check("population", right_serving.population, {"loss": 1e-4, "prompt": 1e-3}),
        *(
            Check(f"int8 {family}", functools.partial(right_models.int8, family), right_models.BOUNDS["float32"])
            for family in (("llama",) if tiny else ("llama", "gpt2", "gemma2"))
        ),
        *of_families("bfloat16"),
    ]


def measured(check: Check) -> dict[str, Any]:
    """Runs a check; returns what it measured, and whether that is within bounds."""
    start = time.perf_counter()
    try:
        found = {name: float(value) for name, value in check.function().items()}
    except Skip as reason:
        return {"status": "skipped", "error": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:500]}"}
    within = all(found[name] <= bound for name, bound in check.bounds.items())  # NaN is not
    return {
        "status": "passed" if within else "failed",
        "measured": found,
        "bounds": dict(check.bounds),
        "seconds": round(time.perf_counter() - start, 2),
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Task, record: Record) -> None:
    """Runs all checks until the time is used up; checks that have not ended by then have failed."""
    from benchmarks.accelerator_stages.right_models import reference_base

    record.update(**device.facts())
    reference_base("llama")  # imports most modules that the threads need
    checks = planned(task.tiny)
    pool = concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, cores()))
    under_way = {pool.submit(measured, check): check for check in checks}
    try:
        for future in concurrent.futures.as_completed(under_way, timeout=max(0.0, task.left - _RESERVE_SECONDS)):
            record.put("rows", under_way[future].name, future.result())
    except concurrent.futures.TimeoutError:
        pass
    rows = record.content.get("rows", {})
    for check in checks:
        if check.name not in rows:
            record.put("rows", check.name, {"status": "out of time"})
    # Threads that are still running end with the process.
    pool.shutdown(wait=False, cancel_futures=True)
    rows = record.content["rows"]
    bad, skipped = failures(rows), [name for name, row in rows.items() if row["status"] == "skipped"]
    counts = f"{len(rows) - len(bad) - len(skipped)} of {len(rows)} checks passed, {len(skipped)} skipped"
    record.update(summary=counts + (f"; did not pass: {', '.join(bad[:6])}" if bad else ""))
    if bad:
        status = "out of time" if all(rows[name]["status"] == "out of time" for name in bad) else "failed"
        reasons = [f"{name}: {rows[name].get('error') or rows[name].get('measured') or 'out of time'}" for name in bad]
        record.update(status=status, error="; ".join(map(str, reasons))[:3000])
