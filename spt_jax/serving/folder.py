"""Follows a directory of prompts: what is new, changed or gone there is so among a service's prompts too."""

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
    """What a look at the directory has changed.

    loaded: prompts that are new or other ones.
    removed: prompts that are gone.
    refused: why a prompt directory was not read, by name, if that is new. What was read of it before stays.
    """

    loaded: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a log."""
        loaded = [f"loaded prompt {name!r}" for name in self.loaded]
        removed = [f"removed prompt {name!r}" for name in self.removed]
        return loaded + removed + [f"kept prompt {name!r} as it was: {why}" for name, why in self.refused.items()]


class FolderWatch:
    """Compares a service's directory with what was read of it. Any thread may look.

    A prompt that was removed from the service by other means comes back when its directory changes.
    """

    def __init__(self, service: Service, seen: Mapping[str, str] | None = None):
        """seen: `marks` of what the service holds already, made before it was read; default it holds nothing."""
        assert service.folder is not None
        self._service, self._folder = service, service.folder
        self._seen = dict(seen or {})
        self._refused: dict[str, str] = {}
        self._missing: set[str] = set()
        self._kinds: set[Any] = set()
        self._lock = threading.Lock()

    def look(self) -> Changes:
        """Loads and removes what the directory asks for.

        A prompt that cannot be read is tried again at the next look. One is gone when two looks in a row miss it,
        since for a moment a save leaves none in place.

        Raises:
          OSError: the directory of prompts cannot be listed; nothing changes.
        """
        with self._lock:
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
        """Why not, if a prompt cannot be loaded."""
        try:
            self._service.load(name)
            # One prompt of a kind compiles for all; what else a prompt needs is made when its first request comes.
            kind = self._service.bank.entry(name).kind
            if kind not in self._kinds:
                self._service.warm(name)
                self._kinds.add(kind)
        except Exception as error:  # whatever is wrong with it, others are still looked at
            return str(error) or repr(error)
        return None

    def _remove(self, missing: set[str]) -> tuple[str, ...]:
        gone, self._missing = sorted(missing & self._missing), missing
        for name in gone:
            with contextlib.suppress(ConfigError):  # someone else has removed it
                self._service.remove(name)
            del self._seen[name]
        return tuple(gone)


async def follow(watch: FolderWatch, seconds: float, tell: Callable[[str], object]) -> None:
    """Looks now and every so many seconds until cancelled, and tells what it has changed, line by line."""
    while True:
        try:
            changes = await asyncio.to_thread(watch.look)
        except Exception as error:  # such as a share that is away for a while
            tell(f"the prompts stay as they are: {error}")
        else:
            for line in changes.lines():
                tell(line)
        await asyncio.sleep(seconds)


def marks(folder: Path) -> dict[str, str]:
    """What tells two states of every prompt directory in a folder apart.

    Hidden ones are left out: saves and synchronisation keep there what is not ready.
    """
    return {own.name: _mark(own) for own in sorted(folder.iterdir()) if own.is_dir() and not own.name.startswith(".")}


def _mark(folder: Path) -> str:
    try:
        files = [(path.name, _state(path)) for path in sorted(folder.iterdir())]
    except OSError as error:
        return str(error)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _state(file: Path) -> object:
    """Size and time, and of `prompt.json`, which holds the tensors' hash, the content: clocks may be coarse."""
    try:
        state = file.stat()
        return state.st_size, state.st_mtime_ns, file.read_bytes() if file.name == INFO_FILE else None
    except OSError as error:
        return str(error)
