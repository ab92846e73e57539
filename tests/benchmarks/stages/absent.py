"""A stage that needs what nobody has."""

from benchmarks.accelerator_stages.process import Record, Task, require


def run(task: Task, record: Record) -> None:
    require("json", "a_package_that_nobody_has")
