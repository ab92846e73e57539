"""Shared by the benchmarks: the machine and versions of a measurement, memory of a process, tables and JSON."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def processor() -> str:
    """Returns the processor's name, or the machine type if the system does not report one."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """Describes the machine and its load: on a busy machine, other programs affect the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads_used": threads,
        "memory_bytes": memory,
        "system": platform.platform(),
        "load_average": os.getloadavg(),
    }


def machine_name(threads: int) -> str:
    """Returns a short name of the machine for file names."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {threads} threads".lower()).strip("-")


def versions(names: Sequence[str]) -> dict[str, str]:
    """Returns Python's version and the versions of those named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Returns the commit of this checkout, with `+changes` if tracked files differ from it; empty without git."""

    def git(*words: str) -> str:
        words = ("git", *words)
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return ""

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def use_cores(threads: int) -> None:
    """Restricts this process to `threads` cores. Call it before any library counts the cores."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def resident_bytes() -> int:
    """Returns the current resident memory of this process (Linux)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process since its start, or since `forget_peak` (Linux)."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Resets the peak resident memory of this process to its current value (Linux; elsewhere it does nothing)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    return int(re.findall(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with padded columns."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def write_json(path: Path, content: Any) -> None:
    """Writes the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
