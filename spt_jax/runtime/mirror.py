"""Work directories on remote file systems, by a local copy whose changes are uploaded.

Everything in a work directory belongs to a prompt and is small, checkpoints included, so a run works in a temporary
local directory, and Orbax writes there as it does elsewhere. Uploaded are files that are complete: after each prompt,
checkpoint and table, and at the end. The order keeps what a killed run leaves usable: the file that makes a checkpoint
or a prompt complete comes last, a prompt is replaced as in `spt_jax.runtime.remote`, and old checkpoints are removed
after the new one is there. A run that is killed loses at most what came after the last checkpoint.

Object stores have no locks. A process that writes puts a lease into the file `MARKER` and renews it; another process is
refused until the lease is released, has expired, or belonged to a process of the same host that has ended.
"""

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from spt_jax.errors import ConfigError, RemoteError, SptError, WriteError
from spt_jax.runtime import remote
from spt_jax.runtime.files import mirrored

MARKER = ".spt_jax"
LEASE_SECONDS = 90.0

# Incomplete files: of this library, and of Orbax.
_TEMPORARY = re.compile(r"\..*\.(tmp|new|old)|.*\.orbax-checkpoint-tmp.*", re.DOTALL)
_CHECKPOINT = re.compile(r"((?:.*/)?checkpoints/\d+)/.*", re.DOTALL)

_MIRRORS: dict[Path, "Mirror"] = {}


def check_shared(workdir: Path, several: bool) -> None:
    """Checks that the processes of a run can share its work directory.

    Raises:
      ConfigError: it is remote, and there are several.
    """
    if several and (url := remote.url_of(workdir)):
        raise ConfigError(
            f"work directory {url} is remote, which works in a run of one process; several processes need a directory"
            " that all of them see, such as a mounted bucket"
        )


@contextlib.contextmanager
def staged(workdir: Path) -> Iterator[Path]:
    """Context manager with the directory to work in: a local work directory itself, or the copy of a remote one.

    Errors raised inside name the URL. Nothing is uploaded but inside `leased`.

    Raises:
      ConfigError: the package of the URL's scheme is not installed.
      RemoteError: the remote directory cannot be reached.
    """
    url = remote.url_of(workdir)
    if url is None:
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="spt_jax-") as folder:
        mirror = Mirror(url, Path(folder).resolve() / (PurePosixPath(url).name or "run"))
        _MIRRORS[mirror.local] = mirror
        try:
            with mirrored(mirror.local, url, mirror.upload):
                yield mirror.local
        except SptError as error:
            error.args = tuple(
                part.replace(str(mirror.local), url) if isinstance(part, str) else part for part in error.args
            )
            raise
        finally:
            del _MIRRORS[mirror.local]


@contextlib.contextmanager
def leased(workdir: Path) -> Iterator[None]:
    """Holds the lease of a staged work directory, and uploads what is left at the end. Does nothing for a local one.

    Raises:
      ConfigError: another process has the lease.
      WriteError: the directory cannot be written.
    """
    mirror = _MIRRORS.get(workdir)
    if mirror is None:
        yield
        return
    with mirror.lease():
        yield


def check_free(workdir: Path) -> None:
    """Checks that no other process has the lease of a staged work directory. Does nothing for a local one.

    Raises:
      ConfigError: one has.
    """
    if workdir in _MIRRORS:
        _MIRRORS[workdir].check_free()


class Mirror:
    """A local copy of a remote work directory.

    Attributes:
      local: the copy.
    """

    def __init__(self, url: str, local: Path):
        """Downloads the directory, which need not exist.

        Raises:
          ConfigError: the package of the URL's scheme is not installed.
          RemoteError: it is a file, cannot be reached, or changes while it is read.
        """
        self._url, self.local = url, local
        self._fs, self._root = remote.file_system(url), remote.root_of(url)
        self._token, self._held, self._lost = uuid.uuid4().hex, False, False
        # Remote files by path, with the state of their local copies; None for what is to be replaced or removed.
        self._uploaded: dict[str, tuple[int, int] | None] = {}
        local.mkdir()
        names = list(remote.listing(url))
        if "" in names:
            raise ConfigError(f"work directory {url} is a file")
        whole = {name: source for name, source in remote.sources(names).items() if _is_complete(name, names)}
        try:
            remote.fetch(url, whole, local)
        except RemoteError:
            self.check_free()
            raise
        found = self._scan()
        self._uploaded = {name: found.get(name) if whole.get(name) == name else None for name in {*names, *whole}}
        self._uploaded.pop(MARKER, None)

    def upload(self) -> None:
        """Uploads the changes since the last call, if this process has the lease.

        Raises:
          WriteError: they cannot be uploaded, or the lease is lost.
        """
        if not self._held:
            return
        if self._lost:
            raise WriteError(f"another process has taken over the work directory {self._url}")
        found = self._scan()
        changed = [name for name, state in found.items() if self._uploaded.get(name) != state]
        gone = [name for name in self._uploaded if name not in found]
        replaced = self._replacements(changed, list(found))
        self._put(replaced)
        self._uploaded |= dict.fromkeys(replaced.values())
        self._put({name: name for name in changed})
        self._uploaded |= {name: found[name] for name in changed}
        remote.remove(self._url, [*replaced.values(), *gone])
        self._uploaded = {name: found[name] for name in self._uploaded if name in found}

    def _scan(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of each complete local file by its relative path."""
        found = {}
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
            for name in names:
                path = Path(folder) / name
                if _TEMPORARY.fullmatch(name) or path == self.local / MARKER:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    found[path.relative_to(self.local).as_posix()] = state.st_size, state.st_mtime_ns
        return found

    def _replacements(self, changed: list[str], names: list[str]) -> dict[str, str]:
        """Returns, for each directory to be replaced, its files and where their first copies go."""
        commits = [name for name in changed if PurePosixPath(name).name in remote.COMMITS and name in self._uploaded]
        folders = {str(PurePosixPath(name).parent) for name in commits}
        return {
            name: f"{remote.new_of(str(PurePosixPath(name).parent))}/{PurePosixPath(name).name}"
            for name in names
            if str(PurePosixPath(name).parent) in folders
        }

    def _put(self, names: dict[str, str]) -> None:
        """Uploads files, given by local and remote path; checkpoints after others, and what completes them last."""
        order: dict[int, list[str]] = {0: [], 1: [], 2: []}
        for name in names:
            commits = PurePosixPath(name).name in remote.COMMITS
            order[2 if commits else 1 if _CHECKPOINT.fullmatch(name) else 0].append(name)
        with remote.reaching(self._url, WriteError):
            for group in filter(None, order.values()):
                paths = [f"{self._root}/{names[name]}" for name in group]
                for path in paths:
                    remote.make_parents(self._fs, self._url, path)
                self._fs.put([str(self.local / name) for name in group], paths)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Holds the lease, renews it in a thread, and at the end uploads what is left."""
        self.check_free()
        with remote.reaching(self._url, WriteError):
            try:
                self._fs.pipe_file(self._marker, self._content(), mode="create")
            except (FileExistsError, NotImplementedError):  # an expired lease, or a file system without this mode
                self._fs.pipe_file(self._marker, self._content())
        self.check_free()  # two processes may have taken over the same expired lease
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended,), daemon=True)
        thread.start()
        self._held = True
        try:
            yield
            self.upload()
        except BaseException:
            if not self._lost:
                with contextlib.suppress(WriteError):
                    self.upload()
            raise
        finally:
            self._held = False
            ended.set()
            thread.join()
            if not self._lost:
                with contextlib.suppress(Exception):  # it expires
                    self._fs.pipe_file(self._marker, self._content(held=False))

    def check_free(self) -> None:
        """Checks that no other process has the lease.

        Raises:
          ConfigError: one has; the message has its id and host.
        """
        holder = self._holder()
        if holder.get("token") == self._token or not _is_alive(holder):
            return
        raise ConfigError(
            f"work directory {self._url} is in use by process {holder.get('pid')} on {holder.get('host')}; wait until"
            f" it ends, stop it, or give another --workdir. If that process was killed, its lease expires in"
            f" {max(holder['until'] - time.time(), 0):.0f} s"
        )

    @property
    def _marker(self) -> str:
        return f"{self._root}/{MARKER}"

    def _content(self, held: bool = True) -> bytes:
        content: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "token": self._token}
        return json.dumps(content | ({"until": time.time() + LEASE_SECONDS} if held else {})).encode() + b"\n"

    def _holder(self) -> dict[str, Any]:
        try:
            with remote.reaching(self._url):
                found = json.loads(self._fs.cat_file(self._marker))
        except RemoteError as error:
            if isinstance(error.__cause__, (FileNotFoundError, ValueError)):
                return {}
            raise
        return found if isinstance(found, dict) else {}

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(Exception):  # the network may come back before the lease expires
                if self._holder().get("token") != self._token:
                    self._lost = True
                    return
                self._fs.pipe_file(self._marker, self._content())


def _is_complete(name: str, names: list[str]) -> bool:
    """Whether a file belongs to no checkpoint, or to one that was uploaded as a whole."""
    found = _CHECKPOINT.fullmatch(name)
    return found is None or f"{found[1]}/_CHECKPOINT_METADATA" in names


def _is_alive(holder: dict[str, Any]) -> bool:
    until = holder.get("until")
    if not isinstance(until, (int, float)) or until < time.time():
        return False
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
