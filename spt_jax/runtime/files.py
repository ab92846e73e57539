"""Atomic writes of small files: none is ever half-written under its final name.

A path may also be a URL (`s3://`), where the put of an object is atomic.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spt_jax.errors import WriteError, closest
from spt_jax.runtime import remote

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

# Local copies of remote directories: the URL of each, and what uploads its changes.
_MIRRORED: dict[Path, tuple[str, Callable[[], None]]] = {}


@contextlib.contextmanager
def mirrored(directory: Path, url: str, upload: Callable[[], None]) -> Iterator[None]:
    """Has the changes of a directory uploaded, and its paths shown as those of a URL."""
    _MIRRORED[directory] = url, upload
    try:
        yield
    finally:
        del _MIRRORED[directory]


def is_mirrored(path: Path) -> bool:
    """Returns whether a path is in a mirrored directory."""
    return any(path.is_relative_to(directory) for directory in _MIRRORED)


def changed(path: Path) -> None:
    """Uploads the changes of the mirrored directory that contains a path. Called when a file or directory is complete.

    Raises:
      WriteError: they cannot be uploaded.
    """
    for directory, (_, upload) in list(_MIRRORED.items()):
        if path.is_relative_to(directory):
            upload()


def shown(path: str | Path) -> str:
    """Returns a path as the user knows it: that of a mirrored or remote file as its URL. A text may contain paths."""
    text = remote.url_of(path) or str(path)
    for directory, (url, _) in _MIRRORED.items():
        text = text.replace(str(directory), url)
    return text


def nearest_path(path: str | Path) -> str:
    """Returns a hint for a message about a local path that does not exist: "; did you mean 'out/trec'?", or "".

    The hint replaces the first part of the path that does not exist by the closest name in the same directory.
    """
    path = Path(path).expanduser()
    with contextlib.suppress(OSError, ValueError):  # such as a name that is too long
        for missing in (path, *path.parents):
            if missing.exists():
                break
            if missing.parent.is_dir():
                near = closest(missing.name, os.listdir(missing.parent))
                if near is None:
                    break
                found = missing.with_name(near) / path.relative_to(missing)
                return f"; did you mean {str(found if found.exists() else missing.with_name(near))!r}?"
    return ""


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
    """Writes a temporary file in the same directory, then renames it to `path`. If `path` is a URL, puts one object.

    Raises:
      ConfigError: the package of the URL's scheme is not installed.
      WriteError: the file cannot be written; a previous file is untouched.
    """
    if url := remote.url_of(path):
        remote.put_file(url, content)
        return
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
    changed(path)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically. Raises as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with a final newline, atomically. Raises as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
