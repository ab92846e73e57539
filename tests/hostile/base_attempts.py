"""Tries model directories one after another, within limits: the process behind test_hostile_bases.py.

    python -m tests.hostile.base_attempts FIRST DIRECTORY... < answers

FIRST is a sound base, by which the libraries are loaded before the limits are set. For each directory one line of JSON
is printed: the name and message of what was raised, the seconds it took and the peak memory in MiB. A directory that
takes more than 20 seconds ends the process by the alarm.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax

from spt_jax.bases.base import load_base
from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import SptError

SECONDS = 20
BYTES = 2 << 30
TEXT = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! The question   is 1234567890123456789012345678901234567890?"


def attempt(directory: str) -> tuple[str, str]:
    """Loads a base and encodes a text with it; the name and message of the error, both empty where it succeeds."""
    try:
        base = load_base(directory, dtype="float32")
        jax.block_until_ready(base.params)
        template = Template(prompt="<soft>{text}", target="{text}", virtual_tokens=2)
        Encoder(template, base.tokenizer, base.config.vocab_size, 4096).encode({"text": TEXT}, 0)
    except SptError as error:
        return type(error).__name__, str(error)
    except BaseException as error:
        return f"TRACEBACK {type(error).__module__}.{type(error).__name__}", str(error)[:1000]
    return "", ""


def peak_mebibytes() -> int:
    """The peak of the resident memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def main() -> None:
    """Tries every directory of the command line."""
    first, *directories = sys.argv[1:]
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    name, message = attempt(first)
    assert not name, message
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
    for directory in directories:
        signal.alarm(SECONDS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.monotonic()
        name, message = attempt(directory)
        signal.alarm(0)
        result: dict[str, Any] = {"directory": directory, "error": name, "message": message}
        result["seconds"] = round(time.monotonic() - start, 2)
        result["mebibytes"] = peak_mebibytes()
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
