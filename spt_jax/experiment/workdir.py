"""Work directories: which directories may be overwritten, locking, and the checks when a run is resumed.

A work directory has the file `.spt_jax`, which marks it as created by this library. The process that writes to the
directory locks this file (flock), so that the lock is released however the process ends; the file has the process's id
and host. Remote work directories are copied to this machine and have a lease instead (`spt_jax.runtime.mirror`).
Directories of version 0.1 have no such file and are recognized by the keys of their config.json.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from spt_jax.bases.fingerprint import Fingerprint
from spt_jax.errors import ConfigError, differing_fields
from spt_jax.experiment.command_line import Job
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.runtime import remote
from spt_jax.runtime.files import nearest_path, shown, write_json, writing
from spt_jax.runtime.mirror import MARKER, check_free, leased, staged

CONFIG_FILE = "config.json"
# Everything that train, sweep, compare and find-rate write; nothing else is deleted. config.json comes first, because
# a directory without it cannot be resumed.
OUTPUTS = (
    CONFIG_FILE, "results.json", "checkpoints", "metrics.jsonl", "prompt", "predictions.jsonl", "curves.png",
    "profile", "tensorboard", "wandb", "wandb-id", "populations", "trials", "trials.jsonl", "trials.csv",
    "trials.parquet", "sweep.png", "compare.json", "compare.md", "compare.png", "rates.json", "rates.png",
    "report.html", "self_study.jsonl", "self_studies",
)  # fmt: skip
_LEFT_BY_A_KILL = [name for own in OUTPUTS for name in (f".{own}.tmp", f".{own}.new", f".{own}.old")]
_CONFIG_KEYS = {"base", "data", "method", "optimizer", "loss", "train", "evaluation", "mesh"}
# Fields that may differ in a resumed run. In version 0.1, sweeps recorded their data in "examples".
_MAY_DIFFER = ("mesh", "log", "inputs", "examples")
# What runs that did not record a part of the config had there.
_NOT_RECORDED = {"task": {"name": None}}

Inputs = Mapping[str, Mapping[str, Any]]
AnyJob = TypeVar("AnyJob", bound=Job[Any])


@contextlib.contextmanager
def in_workdir(job: AnyJob) -> Iterator[AnyJob]:
    """Context manager with the job in the directory where it works: the local copy of a remote work directory.

    Raises:
      ConfigError: the package of the remote path's scheme is not installed.
      RemoteError: the remote directory cannot be reached.
    """
    with staged(job.workdir) as workdir:
        yield dataclasses.replace(job, workdir=workdir)


def input_paths(config: ExperimentConfig[Any], *more: Path) -> list[Path]:
    """Returns the paths that a command reads and must never delete: those named in a config, and `more`.

    Raises:
      ConfigError: one is remote, and the package of its scheme is not installed.
    """
    data, init = config.data, getattr(config.method, "init", None)
    named = [config.base.path, data.train, data.validation, data.test, getattr(init, "path", None)]
    named.append(getattr(config.loss, "text", None))
    for path in (*filter(None, named), *more):
        remote.check_path(path)
    return [*(Path(name).expanduser() for name in named if name), *more]


def check_workdir(path: Path, *, resume: bool | None = None, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Checks that a command may write to a work directory.

    Args:
      path: the work directory.
      resume: whether to resume a run; None for commands that cannot be resumed.
      overwrite: whether to delete the output of an earlier command.
      reads: the paths that the command reads, from `input_paths`.

    Raises:
      ConfigError: it exists and neither `resume` nor `overwrite` is set; there is nothing to resume; another process
        uses it; or overwriting would delete files that this library did not write or that the command reads.
    """
    _check(path, resume=resume, overwrite=overwrite, reads=reads)
    if (path / MARKER).exists():
        with open(path / MARKER, "r+", encoding="utf-8") as file:  # locks on NFS need a file open for writing
            _lock(file, path)
    check_free(path)


def _check(path: Path, *, resume: bool | None, overwrite: bool, reads: Iterable[Path]) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite are mutually exclusive")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"work directory {path} is a file")
    there = next((one for one in (path, *path.absolute().parents) if one.exists()), path)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"work directory {path} cannot be written: no permission to write in {there}")
    with writing(path):
        exists = path.is_dir() and bool(set(os.listdir(path)) - {MARKER, f".{CONFIG_FILE}.tmp"})
    if exists and not (resume or overwrite):
        options = "--overwrite to start over" if resume is None else "--resume to continue or --overwrite to start over"
        raise ConfigError(f"work directory {path} already exists. Use {options}")
    if resume and not (path / CONFIG_FILE).exists():
        raise ConfigError(f"work directory {path} has no run to resume{nearest_path(path)}")
    if overwrite and exists:
        if not _is_ours(path):
            raise ConfigError(
                f"{path} has neither {MARKER} nor the {CONFIG_FILE} of a run, so it was not created by this library;"
                " to overwrite it, delete it yourself first"
            )
        _check_apart(path, reads)


def _is_ours(path: Path) -> bool:
    """Whether a command of this library created the directory. Never true if its config.json is something else's."""
    try:
        content = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):  # missing or damaged
        return (path / MARKER).is_file()
    if not isinstance(content, dict):
        return False
    # compare and find-rate write the config inside their options.
    parts = (content, content.get("config"))
    return any(isinstance(part, dict) and part.keys() >= _CONFIG_KEYS for part in parts)


def _check_apart(path: Path, reads: Iterable[Path]) -> None:
    """Refuses to overwrite a directory that is, contains, or is inside something that the command reads."""
    here = path.resolve()
    for source in reads:
        if url := remote.url_of(source):
            ours, theirs = PurePosixPath(shown(path)), PurePosixPath(url)
            if ours == theirs or ours in theirs.parents or theirs in ours.parents:
                raise ConfigError(
                    f"--overwrite: {shown(path)} and {url}, which this command reads, overlap; give another --workdir"
                )
            continue
        if not source.exists():
            continue  # a hub id, or an error that is reported on reading
        # Files of a directory may be links to other places.
        for real in (source.resolve(), *(file.resolve() for file in (source.iterdir() if source.is_dir() else ()))):
            if here == real or here in real.parents or (real.is_dir() and real in here.parents):
                relation = "is" if here == real else "contains" if here in real.parents else "is inside"
                raise ConfigError(
                    f"--overwrite: {path} {relation} {source}, which this command reads; give another --workdir"
                )


def _lock(file: IO[str], path: Path) -> None:
    """Locks the marker file until it is closed or the process ends.

    Raises:
      ConfigError: another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        try:
            file.seek(0)
            holder = json.load(file)
            who = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # the other process has not written its id yet
            who = "another process"
        raise ConfigError(
            f"work directory {path} is in use by {who}; wait until it ends, stop it, or give another --workdir"
        ) from error
    except OSError as error:
        print(
            f"{path} is on a file system without locks ({error}): make sure that no other process writes to it",
            file=sys.stderr,
        )


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Context manager that creates the work directory if needed and locks it against other processes.

    In a run of several processes, only the first one calls this.

    Raises:
      ConfigError: another process uses it; the message has its id and host.
      WriteError: the directory cannot be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / MARKER, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock)
    with file:
        _lock(file, path)
        with writing(path / MARKER):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            file.flush()
        with leased(path):
            yield


def prepare_workdir(path: Path, *, resume: bool | None = None, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """If `overwrite` is set, deletes this library's files in a work directory that is `held`; other files stay.

    Raises:
      ConfigError: as in `check_workdir`, since another process may have written before this one took the lock.
      WriteError: something in it cannot be deleted.
    """
    _check(path, resume=resume, overwrite=overwrite, reads=reads)
    if not overwrite:
        return
    with writing(path):
        for name in (*OUTPUTS, *_LEFT_BY_A_KILL):
            if (path / name).is_dir() and not (path / name).is_symlink():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
        remaining = sorted(set(os.listdir(path)) - {MARKER})
    if remaining:
        print(f"files in {shown(path)} that this library did not write are not deleted: {', '.join(remaining)}")


def open_workdir(
    path: Path,
    settings: Mapping[str, Any],
    inputs: Inputs,
    *,
    resume: bool,
    overwrite: bool,
    reads: Iterable[Path] = (),
) -> None:
    """Prepares a work directory, checks that a resumed run matches, and writes config.json.

    Args:
      path: the work directory.
      settings: the config as plain JSON.
      inputs: the digests of data and base, from `run.input_digests`.
      resume: as in `check_workdir`.
      overwrite: as in `check_workdir`.
      reads: as in `check_workdir`.

    Raises:
      ConfigError: as in `prepare_workdir`, or the resumed run has another config, other data or another base.
      WriteError: the directory cannot be written.
    """
    prepare_workdir(path, resume=resume, overwrite=overwrite, reads=reads)
    if resume:
        saved = _saved_settings(path)
        _check_settings(path, settings, saved)
        if "inputs" in saved:
            _check_inputs(path, inputs, saved["inputs"])
        else:
            print(
                f"{shown(path)} was created by an older version without digests: data and base are not compared with it"
            )
    write_json(path / CONFIG_FILE, {**settings, "inputs": inputs})


def _saved_settings(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads((path / CONFIG_FILE).read_bytes())
        if not isinstance(saved, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path / CONFIG_FILE} is damaged ({error}): restore it from a copy, or start over with --overwrite"
        ) from error
    return saved


def _check_settings(path: Path, settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    ours, theirs = (
        {k: v for k, v in {**_NOT_RECORDED, **config}.items() if k not in _MAY_DIFFER} for config in (settings, saved)
    )
    different = [
        (name, now, there)
        for name, now, there in differing_fields(ours, theirs)
        # Version 0.1 did not record the default dtype.
        if name != "base.attention" and not (name == "base.dtype" and there is None)
    ]
    if not different:
        return
    fields = [f"{name}: {there!r} in the work directory, {now!r} now" for name, now, there in different]
    message = "the config differs from that of the run to resume: " + "; ".join(fields)
    if "train.steps" in [name for name, _, _ in different]:
        message += ". The schedule of a run depends on its number of steps; " + _further(path, settings["method"])
    raise ConfigError(message)


def _further(path: Path, method: Mapping[str, Any]) -> str:
    """Returns how to train the prompt of a run further, or that its method cannot start from a prompt."""
    if method.get("name") == "progressive_prompts":  # Its initializer is that of the new rows only.
        options = None
    elif "init" in method:
        options = f"--method.init.name prompt --method.init.path {path / 'prompt'}"
    else:
        options = f"--method.path {path / 'prompt'}" if "path" in method else None
    if options is None:
        return "train with all of them in a new run: --workdir OTHER"
    return f"to train its prompt further, start a new run from it: --workdir OTHER {options}"


def _check_inputs(path: Path, inputs: Inputs, saved: Any) -> None:
    there = saved if isinstance(saved, dict) else {}
    advice = f"Restore what the run in {path} started with, or start over with --overwrite or another --workdir"
    for name, digests in inputs["data"].items():
        if digests != there.get("data", {}).get(name):
            raise ConfigError(
                f"the examples of {name} are not those that the run in {path} started with: the file has changed, or"
                f" this version of spt_jax reads it differently. {advice}"
            )
    for name, fingerprint in inputs["base"].items():
        old = there.get("base", {}).get(name)
        different = (
            ["it was not recorded"] if old is None else Fingerprint(**old).differences(Fingerprint(**fingerprint))
        )
        if different:
            raise ConfigError(f"{name} is not the base that the run started with: {'; '.join(different)}. {advice}")
