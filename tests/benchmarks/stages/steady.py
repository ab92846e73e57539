"""A stage that records measurements as fast as it can, for half a second."""

import time

from benchmarks.accelerator_stages.process import Record, Task


def run(task: Task, record: Record) -> None:
    end, number = time.time() + 0.5, 0
    while time.time() < end:
        record.put("rows", str(number % 100), {"status": "passed", "value": list(range(200))})
        number += 1
    record.update(summary=f"{number} records")
