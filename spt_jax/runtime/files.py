"""Small files that are never half-written under their final name."""

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
    """Reports an OSError inside as a `WriteError` about this path, with what to do.

    Raises:
      WriteError: instead of any other OSError.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path | None = None) -> WriteError:
    """What to say of a path that could not be written, and what to do; default, the one that the error names."""
    remedy = ""
    if error.errno in DISK_FULL:
        remedy = ". Free some space and run the command again, with --resume where it has it"
    elif error.errno in READ_ONLY:
        remedy = ". Choose a place that this user can write to"
    return WriteError(f"{path or error.filename or 'a file'} cannot be written ({error.strerror or error}){remedy}")


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory last through a loss of power, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Makes all files below a directory, and its own name, last through a loss of power."""
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
    """Writes beside the file, then renames over it.

    Raises:
      WriteError: it cannot be written; what was there before is untouched.
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
    """UTF-8, atomically; raises as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at the end, atomically; raises as `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
