"""Runs one module's `run(task, record)` in this process and records how it ended."""

import argparse
import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from benchmarks.accelerator_stages.process import Record, Skip, Task, end_with_parent, is_out_of_memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    end_with_parent(args.deadline)
    faulthandler.enable()
    record = Record(args.result, status="running")
    try:
        importlib.import_module(args.module).run(Task(args.result, args.deadline, args.tiny, args.options), record)
    except Skip as reason:
        record.update(status="skipped", error=str(reason))
    except BaseException as error:
        traceback.print_exc()
        status = "out of memory" if is_out_of_memory(error) else "failed"
        record.update(status=status, error=f"{type(error).__name__}: {str(error)[:1000]}")
    else:
        if record.content["status"] == "running":
            record.update(status="passed")
    return 0 if record.content["status"] in ("passed", "skipped") else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # so that threads of a library or a hanging driver do not delay the next stage
