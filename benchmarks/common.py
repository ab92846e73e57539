"""What benchmarks share: the machine and versions that a figure belongs to, memory of a process, tables and JSON."""

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
    """The processor's name, where the system tells it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """The machine, and how busy it is: under load, figures are those of other programs too."""
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
    """A short name for file names."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {threads} threads".lower()).strip("-")


def versions(names: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with `+changes` where tracked files differ from it; empty without git."""

    def git(*words: str) -> str:
        words = ("git", *words)
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return ""

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def use_cores(threads: int) -> None:
    """Restricts this process to so many cores, before any library counts them."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had since its start, or since `forget_peak` (Linux)."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Starts the high-water mark of this process again at what is resident now (Linux; else it stays)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    return int(re.findall(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of even width."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
