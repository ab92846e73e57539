"""A stage that records measurements until it is killed."""

import os

from benchmarks.accelerator_stages.process import Record, Task


def run(task: Task, record: Record) -> None:
    record.update(process=os.getpid())
    number = 0
    while True:
        record.put("rows", str(number % 100), {"status": "passed", "value": [number] * 200})
        number += 1
