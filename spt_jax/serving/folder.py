"""Watches a directory of prompts, and loads, reloads or removes a service's prompts accordingly."""

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError
from spt_jax.prompts.storage import INFO_FILE
from spt_jax.serving.service import Service


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes of one look at the directory.

    Attributes:
      loaded: prompts that are new or have changed.
      removed: prompts that are gone.
      refused: by name, why a prompt directory was not read, if the reason is new. The version read before stays.
    """

    loaded: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the changes as lines for a log."""
        loaded = [f"loaded prompt {name!r}" for name in self.loaded]
        removed = [f"removed prompt {name!r}" for name in self.removed]
        return loaded + removed + [f"prompt {name!r} is unchanged: {why}" for name, why in self.refused.items()]


class FolderWatch:
    """Compares a service's directory with the prompts that were read from it. All methods are thread-safe.

    A prompt that was removed from the service by other means is loaded again when its directory changes.
    """

    def __init__(self, service: Service, seen: Mapping[str, str] | None = None):
        """Creates a watch.

        Args:
          service: the service, which has a directory of prompts.
          seen: the `marks` of the prompts that the service has loaded, taken before loading; None if it has none.
        """
        assert service.folder is not None
        self._service, self._folder = service, service.folder
        self._seen = dict(seen or {})
        self._refused: dict[str, str] = {}
        self._missing: set[str] = set()
        self._kinds: set[Any] = set()
        self._lock = threading.Lock()

    def look(self) -> Changes:
        """Loads new and changed prompts and removes those that are gone.

        A prompt that cannot be read is tried again at the next look. A prompt is removed when two looks in a row do
        not find it, because it is absent for a moment while it is saved.

        Raises:
          OSError: the directory of prompts cannot be listed, or a remote one not reached; nothing changes.
        """
        with self._lock:
            self._service.refresh()
            found = marks(self._folder)
            changed = [name for name, mark in found.items() if mark != self._seen.get(name)]
            problems = {name: self._load(name) for name in changed}
            loaded = tuple(name for name in changed if problems[name] is None)
            self._seen |= {name: found[name] for name in loaded}
            refused = {name: why for name, why in problems.items() if why is not None}
            new = {name: why for name, why in refused.items() if self._refused.get(name) != why}
            self._refused = refused
            return Changes(loaded, self._remove(set(self._seen) - set(found)), new)

    def _load(self, name: str) -> str | None:
        """Loads a prompt; returns the reason if that fails."""
        try:
            self._service.load(name)
            # The first prompt of a kind compiles for all; the other arrays are computed at a prompt's first request.
            kind = self._service.bank.entry(name).kind
            if kind not in self._kinds:
                self._service.warm(name)
                self._kinds.add(kind)
        except Exception as error:  # the other prompts are still loaded
            return str(error) or repr(error)
        return None

    def _remove(self, missing: set[str]) -> tuple[str, ...]:
        gone, self._missing = sorted(missing & self._missing), missing
        for name in gone:
            with contextlib.suppress(ConfigError):  # already removed by other means
                self._service.remove(name)
            del self._seen[name]
        return tuple(gone)


async def follow(watch: FolderWatch, seconds: float, tell: Callable[[str], object]) -> None:
    """Looks now and then every `seconds` seconds until cancelled; passes each line about changes to `tell`."""
    while True:
        try:
            changes = await asyncio.to_thread(watch.look)
        except Exception as error:  # for example, a network share that is temporarily unavailable
            tell(f"the prompts are unchanged: {error}")
        else:
            for line in changes.lines():
                tell(line)
        await asyncio.sleep(seconds)


def marks(folder: Path) -> dict[str, str]:
    """Returns a string for each prompt directory in a folder, which changes when the directory's files change.

    Hidden directories are skipped: saves and synchronization use them for incomplete files.
    """
    paths = sorted(folder.iterdir())
    return {path.name: _mark(path) for path in paths if path.is_dir() and not path.name.startswith(".")}


def _mark(folder: Path) -> str:
    try:
        files = [(path.name, _state(path)) for path in sorted(folder.iterdir())]
    except OSError as error:
        return str(error)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _state(file: Path) -> object:
    """Returns size and time, and for `prompt.json`, which has the tensors' hash, the content: clocks may be coarse."""
    try:
        state = file.stat()
        return state.st_size, state.st_mtime_ns, file.read_bytes() if file.name == INFO_FILE else None
    except OSError as error:
        return str(error)
