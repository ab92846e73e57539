"""Paths of object stores and other remote file systems: `s3://`, `gs://` and what else fsspec knows.

All other modules work on local files. What a command reads is downloaded once per version (`local_copy`), a single file
or a prompt that it writes is uploaded (`put_file`, `put_directory`), and a work directory is mirrored
(`spt_jax.runtime.mirror`). etils' epath hands these schemes to fsspec too, but without the ETags by which a changed
object is recognized and with cached listings, so that fsspec is called directly.

Object stores have no rename: a put of one object is atomic, and nothing else is. A directory that must be complete has
a file that is written last (`COMMITS`), and is replaced by way of a complete copy, `.NAME.new/`, which readers prefer
to `NAME/` while it exists.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import fsspec

from spt_jax.errors import ConfigError, RemoteError, SptError, WriteError
from spt_jax.runtime.extras import load_extra

# The file that is written last in a prompt, and in a checkpoint.
COMMITS = ("prompt.json", "_CHECKPOINT_METADATA")
CACHE = "SPT_JAX_REMOTE_CACHE"

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "memory")
# What identifies a version of a file, by file system.
_VERSION = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "updated",
    "mtime",
    "last_modified",
    "created",
    "blob_id",
    "size",
)
_ATTEMPTS = 3


def url_of(path: str | Path) -> str | None:
    """Returns a remote path as a URL, None for a local path. `Path` drops the second slash of a URL."""
    found = _URL.fullmatch(os.fspath(path))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """Returns the file system of a URL. Its listings are not cached, since other processes write there too.

    Raises:
      ConfigError: the scheme is unknown, or its package is not installed; the message names the extra.
    """
    scheme = url.partition(":")[0]
    if scheme in ("s3", "s3a"):
        load_extra("s3fs", url)
    elif scheme in ("gs", "gcs"):
        load_extra("gcsfs", url)
    elif scheme in ("file", "local"):
        raise ConfigError(f"{url}: give the path itself, without {scheme}://")
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}") from error


def check_path(path: str | Path) -> None:
    """Checks that the package of a remote path's scheme is installed, without a connection. Local paths pass.

    Raises:
      ConfigError: as in `file_system`.
    """
    url = url_of(path)
    if url and not url.startswith("hf://"):
        file_system(url)


@contextlib.contextmanager
def reaching(url: str, kind: type[SptError] = RemoteError) -> Iterator[None]:
    """Turns what file systems raise, which is of many types, into an error that names the URL."""
    try:
        yield
    except SptError:
        raise
    except FileNotFoundError as error:
        raise kind(f"{url}: no such file or directory ({error})") from error
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise kind(f"{url}: {type(error).__name__}: {reason[0][:300]}") from error


def root_of(url: str) -> str:
    """Returns the path of a URL inside its file system."""
    return str(file_system(url)._strip_protocol(url)).rstrip("/")


def listing(url: str) -> dict[str, str]:
    """Returns the version of each file below a directory by its relative path; of a file, under the name "".

    Raises:
      RemoteError: the file system cannot be reached.
    """
    fs, root = file_system(url), root_of(url)
    with reaching(url):
        try:
            found = dict(fs.find(root, detail=True))
        except FileNotFoundError:
            return {}
    return {
        name.removeprefix(root).lstrip("/"): repr([info.get(key) for key in _VERSION])
        for name, info in found.items()
        if info["type"] == "file" and not name.endswith("/") and (name == root or name.startswith(f"{root}/"))
    }


def sources(names: Sequence[str]) -> dict[str, str]:
    """Returns where to read each file of a directory: files of a complete `.NAME.new/` replace those of `NAME/`.

    Args:
      names: the relative paths of all files.
    """
    hidden = {name: str(PurePosixPath(name).parent) for name in names if _is_new(str(PurePosixPath(name).parent))}
    complete = {hidden[name] for name in hidden if PurePosixPath(name).name in COMMITS}
    final = {folder: _final(folder) for folder in complete}
    found = {
        name: name for name in names if name not in hidden and str(PurePosixPath(name).parent) not in final.values()
    }
    for name, folder in hidden.items():
        if folder in complete:
            found[f"{final[folder]}/{PurePosixPath(name).name}"] = name
    return found


def _is_new(folder: str) -> bool:
    name = PurePosixPath(folder).name
    return name.startswith(".") and name.endswith(".new")


def new_of(folder: str) -> str:
    """Returns the path of the complete copy by way of which a directory is replaced."""
    parent, _, name = folder.rpartition("/")
    return f"{parent}/.{name}.new".lstrip("/")


def _final(folder: str) -> str:
    path = PurePosixPath(folder)
    return str(path.with_name(path.name[1:].removesuffix(".new")))


def fetch(url: str, names: Mapping[str, str], target: Path) -> None:
    """Downloads files of a directory.

    Args:
      url: the directory; of one file, its URL.
      names: the path of each file in `target`, and its path below `url`, which is "" for one file.
      target: a local directory.

    Raises:
      RemoteError: a file is missing, or the file system cannot be reached.
    """
    fs, root = file_system(url), root_of(url)
    local = [target / name for name in names]
    for folder in {path.parent for path in local}:
        folder.mkdir(parents=True, exist_ok=True)
    with reaching(url):
        if local:
            fs.get([f"{root}/{name}".rstrip("/") for name in names.values()], [str(path) for path in local])


def local_copy(path: str | Path, patterns: Sequence[str] = ("*",)) -> Path:
    """Returns a local copy of a remote file or directory; a local path is returned as it is.

    Copies are kept by version in ~/.cache/spt_jax/remote, or the directory in the environment variable
    SPT_JAX_REMOTE_CACHE, which may be deleted at any time.

    Args:
      path: a local path or a URL.
      patterns: the names of the files of a directory that are downloaded.

    Raises:
      ConfigError: as in `file_system`.
      RemoteError: there is no such file, it cannot be reached, or it changes while it is read.
    """
    url = url_of(path)
    if url is None:
        return Path(path)
    name = PurePosixPath(url).name
    for _ in range(_ATTEMPTS):
        source, versions = _current(url)
        if not versions:
            raise RemoteError(f"{url}: no such file or directory")
        chosen = {own: own for own in sources(list(versions)) if any(fnmatch(own, pattern) for pattern in patterns)}
        read = sources(list(versions))
        names = {name: ""} if "" in versions else {f"{name}/{own}": read[own] for own in chosen}
        identity = hashlib.sha256(repr((url, sorted(versions.items()), sorted(patterns))).encode()).hexdigest()
        place = _cache() / identity[:32]
        if (place / name).exists():
            return place / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            (Path(folder) / "copy").mkdir()
            try:
                fetch(source, names, Path(folder) / "copy")
            except RemoteError:
                if _current(url) == (source, versions):
                    raise
                continue
            if _current(url) != (source, versions):
                continue
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(Path(folder) / "copy", place)
        return place / name
    raise RemoteError(f"{url}: changes while it is read")


def _current(url: str) -> tuple[str, dict[str, str]]:
    """Returns the URL from which to read, and the versions of its files."""
    versions = listing(url)
    scheme, _, path = url.partition("://")
    if "" not in versions and "/" in path:
        new = f"{scheme}://{new_of(path)}"
        replacing = listing(new)
        if any(name in COMMITS for name in replacing):
            return new, replacing
    return url, versions


def _cache() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "spt_jax" / "remote")


def put_file(url: str, content: bytes) -> None:
    """Writes one object, which is atomic on object stores.

    Raises:
      ConfigError: as in `file_system`.
      WriteError: it cannot be written.
    """
    _put(url, {"": content})


def put_directory(url: str, files: Mapping[str, bytes]) -> None:
    """Writes a directory with a file of `COMMITS`, or replaces one. Readers see the previous files or the new ones.

    Raises:
      ConfigError: as in `file_system`.
      WriteError: it cannot be written, or it holds other files.
    """
    present = listing(url)
    if foreign := sorted(set(present) - set(files)):
        raise WriteError(f"{url}: holds {foreign[0]!r}, so it is not a directory to replace")
    ordered = dict(sorted(files.items(), key=lambda file: file[0] in COMMITS))
    if not present:
        _put(url, ordered)
        return
    scheme, _, path = url.partition("://")
    new = f"{scheme}://{new_of(path)}"
    _put(new, ordered)
    _put(url, ordered)
    remove(new, list(files))


def _put(url: str, files: Mapping[str, bytes]) -> None:
    fs, root = file_system(url), root_of(url)
    with reaching(url, WriteError):
        for name, content in files.items():
            path = f"{root}/{name}".rstrip("/")
            make_parents(fs, url, path)
            fs.pipe_file(path, content)


def make_parents(fs: fsspec.AbstractFileSystem, url: str, path: str) -> None:
    """Creates the directory of a file, on file systems that have directories. On s3fs, this would create buckets."""
    if url.partition(":")[0] not in _OBJECT_STORES:
        fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)


def remove(url: str, names: Sequence[str]) -> None:
    """Removes files of a directory; those of `COMMITS` first, so that nothing incomplete looks complete.

    Raises:
      WriteError: they cannot be removed.
    """
    fs, root = file_system(url), root_of(url)
    with reaching(url, WriteError):
        for commits in (True, False):
            paths = [f"{root}/{name}" for name in names if (PurePosixPath(name).name in COMMITS) is commits]
            with contextlib.suppress(FileNotFoundError):
                fs.rm(paths)


class RemoteFolder:
    """A local copy of a remote directory that can be brought up to date. Its methods are thread-safe.

    Attributes:
      local: the copy.
    """

    def __init__(self, url: str, local: Path):
        """Downloads the directory.

        Raises:
          ConfigError: as in `file_system`.
          RemoteError: it is empty, or cannot be reached.
        """
        self._url, self.local = url, local
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        local.mkdir(parents=True, exist_ok=True)
        self.refresh()
        if not self._versions:
            raise RemoteError(f"{url}: no such directory, or an empty one")

    def refresh(self) -> None:
        """Downloads the entries that have changed, each under a hidden name first, and removes those that are gone.

        Raises:
          RemoteError: the directory cannot be reached; entries that are not downloaded stay as they are.
        """
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        for _ in range(_ATTEMPTS):
            versions = listing(self._url)
            before, after = _by_entry(self._versions), _by_entry(versions)
            try:
                for entry in after:
                    if after[entry] != before.get(entry):
                        self._fetch(entry, after[entry])
            except RemoteError:
                if listing(self._url) == versions:
                    raise
                continue
            if listing(self._url) != versions:
                continue
            for entry in set(before) - set(after):
                _delete(self.local / entry)
            self._versions = versions
            return
        raise RemoteError(f"{self._url}: changes while it is read")

    def _fetch(self, entry: str, files: Mapping[str, tuple[str, str]]) -> None:
        hidden = f".{entry}.new"
        _delete(self.local / hidden)
        fetch(
            self._url, {f"{hidden}{own.removeprefix(entry)}": source for own, (source, _) in files.items()}, self.local
        )
        _delete(self.local / entry)
        (self.local / hidden).rename(self.local / entry)


def _by_entry(versions: Mapping[str, str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Returns the files of each entry of a directory: the source and version of each."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for own, source in sources(list(versions)).items():
        found.setdefault(own.partition("/")[0], {})[own] = source, versions[source]
    return found


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
