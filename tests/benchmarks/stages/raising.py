"""A stage that fails."""

from benchmarks.accelerator_stages.process import Record, Task


def run(task: Task, record: Record) -> None:
    raise ValueError("no such measurement")
