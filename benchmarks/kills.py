"""Kills runs and sweeps at random moments with SIGKILL, SIGTERM or SIGINT, resumes them, and compares their results.

    python -m benchmarks.kills [--runs 20] [--sweeps 20] [--signals KILL TERM INT] [--seed 0]

Prints a line per trial. Fails if the results are not bit for bit those of an uninterrupted job, if a stopped process
prints more than one line about it or has an exit code other than 130 or 143, or if temporary files are left over.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.jobs import ROOT, history, unmeasured, words, write_task

QUICK = ("--train.steps", "12", "--train.evaluate-every", "4", "--train.checkpoint-every", "2")
JOBS = {
    "run": [sys.executable, "train.py"],
    "sweep": [sys.executable, "-m", "spt_jax", "sweep"],
}
OPTIONS = {"run": QUICK, "sweep": (*QUICK, "--lengths", "2", "3", "--seeds", "0", "1", "--resolution", "0.2")}
PROGRESS = (
    "loading JAX",
    "compiling",
    "training:",
    "comparing:",
    "sweep:",
    ": validation ",
)  # What a job prints to stderr if nothing stops it.
ENDS = ("*.json", "metrics.jsonl", "predictions.jsonl", "trials.jsonl", "trials.csv", "*.safetensors")


def end(workdir: Path) -> dict[str, object]:
    """Returns the files of a finished job, without measured times."""
    found: dict[str, object] = {}
    for pattern in ENDS:
        for path in workdir.rglob(pattern):
            if "checkpoints" in path.parts:
                continue
            name, content = str(path.relative_to(workdir)), path.read_bytes()
            if path.name == "metrics.jsonl":
                found[name] = history(path.parent)
            else:
                found[name] = unmeasured(json.loads(content)) if path.suffix == ".json" else content
    found["names"] = sorted(
        str(path.relative_to(workdir)) for path in workdir.rglob("*") if "checkpoints" not in path.parts
    )
    found["checkpoints"] = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("checkpoints/*"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--signals", nargs="+", default=["KILL"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_task(files)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(files / "cache")}
        for kind, count in (("run", options.runs), ("sweep", options.sweeps)):
            workdir = files / kind
            line = [*JOBS[kind], *words(files, workdir, *OPTIONS[kind])]

            def start(*more: str, line: list[str] = line) -> subprocess.Popen[str]:
                return subprocess.Popen(
                    [*line, *more],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )

            if not count:
                continue
            start().communicate()  # compiles
            started = time.monotonic()
            process = start("--overwrite")
            error = process.communicate()[1]
            assert process.returncode == 0, error
            seconds, expected = time.monotonic() - started, end(workdir)
            for number in range(count):
                name = chance.choice(options.signals)
                stop, moment = signal.Signals[f"SIG{name}"], chance.uniform(0.05, 1.0) * seconds
                shutil.rmtree(workdir)
                process = start()
                try:
                    error = process.communicate(timeout=moment)[1]
                except subprocess.TimeoutExpired:
                    process.send_signal(stop)
                    error = process.communicate()[1]
                code = process.returncode
                printed = [text for text in error.splitlines() if text.strip() and not any(map(text.count, PROGRESS))]
                clean = code in (0, -9) or (code == 128 + stop and len(printed) == 1 and "stopped by" in printed[0])
                left = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
                process = start(*(["--resume"] if (workdir / "config.json").exists() else []))
                error = process.communicate()[1]
                if process.returncode:
                    differing = [f"exit code {process.returncode}", error[-2000:]]
                else:
                    found = end(workdir)
                    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
                failed = not clean or bool(differing) or len(left) > 1
                failures += failed
                verdict = f"FAILED: printed {printed}, differs in {differing}, left {left}" if failed else "ok"
                print(
                    f"{kind} {number + 1}: SIG{name} after {moment:.1f} of {seconds:.1f} s, {code}: {verdict}",
                    flush=True,
                )
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
