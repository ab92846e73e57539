"""Results that are kept between runs in the user's cache folder, by a digest of all that they depend on.

Files are written atomically with the SHA-256 of their content. One that is damaged, or that cannot be read, counts as
absent, so that its content is computed again.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# The environment variable that names the folder; OFF for no cache.
CACHE = "SPT_JAX_CACHE"
OFF = "off"
# Of all files of one kind; the ones that were not used for the longest time are removed.
MAX_BYTES = 2 << 30

_DIGEST_BYTES = 32


def cache_folder(kind: str) -> Path | None:
    """Returns the folder of one kind of results; None if the cache is switched off or there is no home directory.

    Args:
      kind: the name of the folder in $SPT_JAX_CACHE, by default in ~/.cache/spt_jax.
    """
    chosen = os.environ.get(CACHE)
    if chosen == OFF:
        return None
    try:
        return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "spt_jax") / kind
    except RuntimeError:  # no home directory
        return None


@functools.cache
def code_digest() -> str:
    """Returns the SHA-256 of the source of this package: what another version computed is never used."""
    sha, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        sha.update(f"{file.relative_to(package).as_posix()}\0".encode())
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()


def cache_key(facts: Any) -> str:
    """Returns the key of what depends on these facts and on the source of this package.

    Args:
      facts: plain JSON values; the text of other values is used.
    """
    text = json.dumps([code_digest(), facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_entry(kind: str, key: str) -> bytes | None:
    """Returns what was written under a key; None if there is nothing, or the file is damaged.

    Args:
      kind: the kind of result.
      key: the result of `cache_key`.
    """
    folder = cache_folder(kind)
    if folder is None:
        return None
    file = folder / key
    try:
        content = file.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # of a folder that cannot be written
        os.utime(file)  # it was used now
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write_entry(kind: str, key: str, content: bytes) -> None:
    """Writes content under a key. If that fails, a line on stderr says why, and nothing is kept.

    Args:
      kind: the kind of result.
      key: the result of `cache_key`.
      content: the content, at most a quarter of `MAX_BYTES`; larger content is not kept.
    """
    folder = cache_folder(kind)
    if folder is None or len(content) > MAX_BYTES // 4:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
                file.close()
                os.replace(file.name, folder / key)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        _remove_oldest(folder)
    except OSError as error:
        print(f"{kind} are not cached for the next run: {error}", file=sys.stderr)


def _remove_oldest(folder: Path) -> None:
    """Removes files until the rest is within `MAX_BYTES`."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= MAX_BYTES:
            break
        file.unlink(missing_ok=True)
        total -= size


# At import, so that a change of the files while a program runs is not taken for its own code.
code_digest()
