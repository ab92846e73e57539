"""Work directories: which are ours, who writes into one, and what a resumed run must share with the one it resumes.

A work directory holds `.spt_jax`, which marks it as ours. Whatever writes into the directory keeps that file locked
(flock), so that the lock ends with the process however it ends; the file names the process. Directories of version 0.1
have no such file and are known by the keys of their config.json.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from spt_jax.bases.base import Fingerprint
from spt_jax.errors import ConfigError, differing_fields
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.runtime.files import write_json, writing

CONFIG_FILE = "config.json"
MARKER = ".spt_jax"
# Everything that train, sweep, compare and find-rate write: nothing else is deleted. First what makes the directory
# one that can be resumed.
OUTPUTS = (
    CONFIG_FILE, "results.json", "checkpoints", "metrics.jsonl", "prompt", "predictions.jsonl", "curves.png",
    "profile", "tensorboard", "wandb", "wandb-id", "populations", "trials", "trials.jsonl", "trials.csv",
    "trials.parquet", "sweep.png", "compare.json", "compare.md", "compare.png", "rates.json", "rates.png",
)  # fmt: skip
_LEFT_BY_A_KILL = [name for own in OUTPUTS for name in (f".{own}.tmp", f".{own}.new", f".{own}.old")]
_CONFIG_KEYS = {"base", "data", "method", "optimizer", "loss", "train", "evaluation", "mesh"}
# A run may go on elsewhere, with another attention kernel, and log to other places. "examples" is what sweeps of
# version 0.1 recorded of their data.
_MAY_DIFFER = ("mesh", "log", "inputs", "examples")

Inputs = Mapping[str, Mapping[str, Any]]


def input_paths(config: ExperimentConfig[Any], *more: Path) -> list[Path]:
    """What a command reads and must never delete: the base, the data and prompts of a config, and `more`."""
    data, init = config.data, getattr(config.method, "init", None)
    named = [config.base.path, data.train, data.validation, data.test, getattr(init, "path", None)]
    return [*(Path(name).expanduser() for name in named if name), *more]


def check_workdir(path: Path, *, resume: bool | None = None, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Checks that a command may write into a work directory.

    Args:
      path: the work directory.
      resume: None for commands that cannot be resumed.
      overwrite: delete what an earlier command has written there.
      reads: `input_paths`.

    Raises:
      ConfigError: it exists and neither resume nor overwrite is asked; there is nothing to resume; another process
        writes into it; or overwriting would delete files that no command of ours has made, or that this one reads.
    """
    _check(path, resume=resume, overwrite=overwrite, reads=reads)
    if (path / MARKER).exists():
        with open(path / MARKER, "r+", encoding="utf-8") as file:  # Locks on NFS need a file that is open for writing.
            _lock(file, path)


def _check(path: Path, *, resume: bool | None, overwrite: bool, reads: Iterable[Path]) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"work directory {path} is a file")
    with writing(path):
        exists = path.is_dir() and bool(set(os.listdir(path)) - {MARKER, f".{CONFIG_FILE}.tmp"})
    if exists and not (resume or overwrite):
        ways = "--overwrite to start anew" if resume is None else "--resume to go on or --overwrite to start anew"
        raise ConfigError(f"work directory {path} already exists. Use {ways}")
    if resume and not (path / CONFIG_FILE).exists():
        raise ConfigError(f"work directory {path} holds no run to resume")
    if overwrite and exists:
        if not _is_ours(path):
            raise ConfigError(
                f"{path} has no {MARKER} and no {CONFIG_FILE} of a run, so no run of ours made it; delete it yourself"
                " if you mean it"
            )
        _check_apart(path, reads)


def _is_ours(path: Path) -> bool:
    """Whether one of our commands made this directory. One with the config.json of something else is never ours."""
    try:
        content = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):  # none, or damaged
        return (path / MARKER).is_file()
    if not isinstance(content, dict):
        return False
    # compare and find-rate have their own options around the config.
    return any(isinstance(own, dict) and own.keys() >= _CONFIG_KEYS for own in (content, content.get("config")))


def _check_apart(path: Path, reads: Iterable[Path]) -> None:
    """Refuses to overwrite what is, contains, or lies in something that the command reads."""
    here = path.resolve()
    for source in reads:
        if not source.exists():
            continue  # a hub id, or an error that is reported where it is read
        # Files of a directory may be links to somewhere else.
        for real in (source.resolve(), *(file.resolve() for file in (source.iterdir() if source.is_dir() else ()))):
            if here == real or here in real.parents or (real.is_dir() and real in here.parents):
                relation = "is" if here == real else "contains" if here in real.parents else "lies in"
                raise ConfigError(
                    f"--overwrite: {path} {relation} {source}, which this command reads; give another --workdir"
                )


def _lock(file: IO[str], path: Path) -> None:
    """Locks the marker until the file is closed or the process ends.

    Raises:
      ConfigError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        try:
            file.seek(0)
            holder = json.load(file)
            who = f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # it has just begun and not written it yet
            who = "another process"
        raise ConfigError(
            f"work directory {path} is in use by {who}; wait until it has ended, stop it, or give another --workdir"
        ) from error
    except OSError as error:
        print(f"{path} is on a file system without locks ({error}): nothing else may write into it", file=sys.stderr)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Makes the work directory if needed, and keeps every other process from writing into it.

    In a run of several processes, only the first calls this.

    Raises:
      ConfigError: another process writes into it; names its id and host.
      WriteError: the directory cannot be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / MARKER, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the lock)
    with file:
        _lock(file, path)
        with writing(path / MARKER):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
            file.flush()
        yield


def prepare_workdir(path: Path, *, resume: bool | None = None, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Empties a work directory that is `held`, unless it is resumed. Files that no command of ours writes stay.

    Raises:
      ConfigError: as `check_workdir`, for another process may have written before this one held it.
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
        left = sorted(set(os.listdir(path)) - {MARKER})
    if left:
        print(f"left in {path}, because no command of ours wrote it: {', '.join(left)}")


def open_workdir(
    path: Path,
    settings: Mapping[str, Any],
    inputs: Inputs,
    *,
    resume: bool,
    overwrite: bool,
    reads: Iterable[Path] = (),
) -> None:
    """`prepare_workdir`, with the settings of a run or sweep, and what it reads, in the directory's config.json.

    Args:
      settings: the config as plain JSON.
      inputs: `experiment.input_digests`.

    Raises:
      ConfigError: also, what is resumed has another config, other data or another base.
      WriteError: the directory cannot be written.
    """
    prepare_workdir(path, resume=resume, overwrite=overwrite, reads=reads)
    if resume:
        saved = _saved_settings(path)
        _check_settings(path, settings, saved)
        if "inputs" in saved:
            _check_inputs(path, inputs, saved["inputs"])
        else:
            print(f"{path} was made by an older version, which recorded no digests: its data and base are not compared")
    write_json(path / CONFIG_FILE, {**settings, "inputs": inputs})


def _saved_settings(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads((path / CONFIG_FILE).read_bytes())
        if not isinstance(saved, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path / CONFIG_FILE} is damaged ({error}): restore it from a copy, or start anew with --overwrite"
        ) from error
    return saved


def _check_settings(path: Path, settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    ours, theirs = ({k: v for k, v in own.items() if k not in _MAY_DIFFER} for own in (settings, saved))
    different = [
        (name, now, there)
        for name, now, there in differing_fields(ours, theirs)
        # Version 0.1 recorded no precision where none was asked for.
        if name != "base.attention" and not (name == "base.dtype" and there is None)
    ]
    if not different:
        return
    fields = [f"{name}: {there!r} in the work directory, {now!r} now" for name, now, there in different]
    message = "this is not the config of the run to resume: " + "; ".join(fields)
    if "train.steps" in [name for name, _, _ in different]:
        message += (
            ". The schedule of a run depends on its number of steps; to train its prompt further, start a new run from"
            f" it: --workdir OTHER --method.init.name prompt --method.init.path {path / 'prompt'}"
        )
    raise ConfigError(message)


def _check_inputs(path: Path, inputs: Inputs, saved: Any) -> None:
    there = saved if isinstance(saved, dict) else {}
    ways = f"Put back what the run in {path} began with, or start anew with --overwrite or another --workdir"
    for name, digests in inputs["data"].items():
        if digests != there.get("data", {}).get(name):
            raise ConfigError(
                f"the examples of {name} are not those that the run in {path} began with: the file has changed, or this"
                f" version of spt_jax reads it differently. {ways}"
            )
    for name, fingerprint in inputs["base"].items():
        old = there.get("base", {}).get(name)
        different = (
            ["it is not recorded"] if old is None else Fingerprint(**old).differences(Fingerprint(**fingerprint))
        )
        if different:
            raise ConfigError(f"{name} is not the base that the run began with: {'; '.join(different)}. {ways}")
