"""Atomic writes of small files: none is ever half-written under its final name."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spt_jax.errors import WriteError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError raised inside into a `WriteError` that names this path and a remedy.

    Raises:
      WriteError: in place of any other OSError.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path | None = None) -> WriteError:
    """Returns a `WriteError` with the cause and a remedy. `path` defaults to the file that the error names."""
    remedy = ""
    if error.errno in DISK_FULL:
        remedy = ". Free some space and run the command again, with --resume where it has it"
    elif error.errno in READ_ONLY:
        remedy = ". Choose a place that this user can write to"
    return WriteError(f"{path or error.filename or 'a file'} cannot be written ({error.strerror or error}){remedy}")


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory survive a power loss, where the file system supports it."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Makes all files below a directory, and the name of the directory, survive a power loss."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
    sync_directory(directory.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a temporary file in the same directory, then renames it to `path`.

    Raises:
      WriteError: the file cannot be written; a previous file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically. Raises as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with a final newline, atomically. Raises as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
