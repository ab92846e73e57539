"""Random damage to files, of bytes and of what JSON and headers declare, and the limits that readers must keep."""

import contextlib
import copy
import json
import os
import random
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 20
BYTES = 2 << 30

EXTREMES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**12, -(10**12), 10**400, 0.5, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "\ud83d", "\x00", "x" * 100_000, "<soft>", "<soft:3><soft:9>", "<soft:99999999999>",
    "<soft:" + "9" * 5000 + ">", "{text}" * 1000, "{", "<bos>", "{messages}", "../../etc/passwd", [], [1], [[]],
    ["a"] * 1000, {}, {"a": 1}, {"": {}},
]  # fmt: skip


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes set, removed, repeated or put in, the end cut off."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + content[end:]
            case 2:
                content = content[:end] + content[at:]
            case 3:
                content = content[:at] + rng.randbytes(rng.choice((1, 8, 100))) + content[at:]
            case _:
                content = content[:at] + bytes([rng.choice((0, 1, 34, 57, 91, 123, 127, 128, 255))]) + content[at + 1 :]
    return content


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A few values of a JSON tree replaced by extreme ones, removed, renamed, or exchanged with each other."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(EXTREMES)
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", f"{key}s", "\ud83d", "name"))] = holder.pop(key)
            case 2:
                holder[key] = deep(rng.choice((30, 500, 900)))
            case 3:
                other, name = rng.choice(places)
                holder[key] = copy.deepcopy(other[name])
            case _:
                holder[key] = rng.choice(EXTREMES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _text(value: Any) -> str:
    """JSON text; of values that Python cannot write, text that is nested as deeply."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 2000


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Another header, its length told rightly mostly, before the same or damaged tensors."""
    length = int.from_bytes(content[:8], "little")
    header = _text(mutated_json(json.loads(content[8 : 8 + length]), rng)).encode()
    told = rng.choice((len(header), len(header), len(header), 0, 2**40, len(header) - 1))
    tensors = content[8 + length :]
    return struct.pack("<Q", told) + header + rng.choice((tensors, tensors, tensors + b"\0", tensors[:-1], b""))


def changed_file(path: Path, rng: random.Random) -> None:
    """Damages one file in the way of its kind."""
    content = path.read_bytes()
    if rng.random() < 0.3 or path.suffix not in (".json", ".safetensors"):
        path.write_bytes(mutated_bytes(content, rng))
    elif path.suffix == ".json":
        path.write_text(_text(mutated_json(json.loads(content), rng)))
    else:
        path.write_bytes(mutated_safetensors(content, rng))


@contextlib.contextmanager
def limits(seconds: int = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Raises TimeoutError after some seconds, and MemoryError for more than `size` bytes over what is in use."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
