"""A stage that records one measurement and then hangs, with a process of its own that would hang too."""

import subprocess
import sys
import time

from benchmarks.accelerator_stages.process import Record, Task


def run(task: Task, record: Record) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record.update(rows={"first": {"status": "passed"}}, child=child.pid)
    print("about to hang", flush=True)
    time.sleep(600)
