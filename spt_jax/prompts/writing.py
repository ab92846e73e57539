"""Writes directories of files, whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from spt_jax.errors import CheckpointError
from spt_jax.runtime.files import changed, sync_directory
from spt_jax.runtime.remote import put_directory, url_of


def write_directory(directory: str | Path, files: Mapping[str, bytes]) -> Path:
    """Atomically writes a directory of these files. An existing directory is replaced if it holds no other files.

    Raises:
      CheckpointError: it holds other files, or cannot be written; previous content is untouched.
      WriteError: the same for a URL.
    """
    if url := url_of(directory):
        put_directory(url, files)
        return Path(directory)
    directory = Path(directory)
    try:
        _write_directory(directory.resolve(), files)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: the prompt was not saved ({error.strerror or error}); previous content is untouched"
        ) from error
    changed(directory.resolve())
    return directory


def _write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    new, old = directory.with_name(f".{directory.name}.new"), directory.with_name(f".{directory.name}.old")
    if directory.exists():
        foreign = sorted(set(os.listdir(directory)) - set(files))
        if foreign:
            raise CheckpointError(f"{directory}: holds {foreign[0]!r}, so it is not a prompt directory to replace")
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        for name, content in files.items():
            with (new / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(new)
        if directory.exists():
            # A directory of this name is left from an interrupted save, and older than the current prompt.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(directory, old)
        try:
            os.rename(new, directory)
        except BaseException:
            if old.exists():
                os.rename(old, directory)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_directory(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
