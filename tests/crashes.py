"""What a crash leaves: the work directory at every change that a run makes to it, with and without what was not synced.

A `Recorder` copies the directory before each change, as Python's audit events report them (Orbax's own too; TensorStore
writes and syncs its arrays out of their sight). A copy is what SIGKILL at that moment leaves. Without what was not
synced, files hold what they held at their last fsync, or nothing: what a loss of power may leave.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link"}


class Recorder:
    """Copies `directory` to a new directory in `copies` before every change of it, or before every n-th.

    Attributes:
      changes: how many there were.
      crashes: the copies, each with the files that were not synced and what each held at its last fsync.
    """

    def __init__(self, directory: Path, copies: Path, every: int = 1):
        self.directory, self.copies, self.every = directory, copies, every
        self.changes = 0
        self.crashes: list[tuple[Path, dict[Path, bytes]]] = []
        self._lock = threading.RLock()
        self._active = self._copying = False
        self._seen: set[str] = set()
        self._synced: dict[Path, bytes] = {}
        self._written: set[Path] = set()
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records what is done inside, in all threads."""
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_file() and self.directory in path.parents:
                self._synced[path] = path.read_bytes()

        os.fsync, self._active = noted, True
        try:
            yield
        finally:
            os.fsync, self._active = fsync, False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or not (event in CHANGES or event == "open"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = Path(os.fsdecode(arguments[0]))
        if self.directory not in path.parents:
            return
        with self._lock:
            if self._copying:
                return
            if self.changes % self.every == 0:
                self._copying = True
                try:
                    self._copy()
                finally:
                    self._copying = False
            self.changes += 1
            if event == "open":
                self._written.add(path)
            if event in ("os.rename", "os.remove"):
                self._move(path, Path(os.fsdecode(arguments[1])) if event == "os.rename" else None)

    def _move(self, path: Path, target: Path | None) -> None:
        """Follows a file, or all in a directory, to its new name; to None, forgets it."""
        for known in [*self._synced, *self._written]:
            if known != path and path not in known.parents:
                continue
            content, was_written = self._synced.pop(known, None), known in self._written
            self._written.discard(known)
            if target is None:
                continue
            if content is not None:
                self._synced[target / known.relative_to(path)] = content
            if was_written:
                self._written.add(target / known.relative_to(path))

    def _copy(self) -> None:
        target = self.copies / f"{self.changes:03d}"
        while True:  # until TensorStore has not changed anything meanwhile
            shutil.rmtree(target, ignore_errors=True)
            try:
                if self.directory.exists():
                    shutil.copytree(self.directory, target, symlinks=True)
                break
            except (shutil.Error, OSError):
                continue
        if not target.exists() or (content := _digest(target)) in self._seen:
            return
        self._seen.add(content)
        lost = {path.relative_to(self.directory): self._synced.get(path, b"") for path in self._written}
        self.crashes.append((target, {path: content for path, content in lost.items() if (target / path).is_file()}))


def _digest(directory: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        sha.update(str(path.relative_to(directory)).encode() + (path.read_bytes() if path.is_file() else b"/"))
    return sha.hexdigest()
