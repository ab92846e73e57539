"""Training checkpoints with Orbax: asynchronous, atomic, and bit-exact. The last few are kept.

The checkpoint of step n is the directory `n/` with the items `prompt` (the method's parameters), `train` (step and
optimizer state) and `data` (the state of the stream of batches), and with JSON metadata. Orbax detects most damage to
its files; a SHA-256 of everything that was saved detects all of it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.runtime.files import DISK_FULL, changed, is_mirrored, shown, sync_tree
from spt_jax.training.step import TrainState

FORMAT = 1

T = TypeVar("T")

_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax does not list directories with this in their name.


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in Path(record.pathname).as_posix() and "tensorstore" not in record.getMessage()


# For one damaged file or full disk, Orbax logs dozens of tracebacks before it raises the error, which is reported here.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_of_orbax)


class DamagedError(CheckpointError):
    """The contents of a checkpoint differ from what was saved."""


class Checkpoints:
    """The checkpoints of a work directory. Each process of a run creates one and calls the same methods.

    `save` copies the state to the host and returns. The files are written in the background and appear under their
    final name when they are complete. If writing fails, the next `save`, `wait`, `restore` or `close` raises the error.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """Opens a directory of checkpoints, and creates it if it does not exist.

        Args:
          directory: contains one directory per step.
          keep: how many of the last checkpoints to keep.

        Raises:
          ConfigError: `keep` is below 1.
          CheckpointError: the directory cannot be created or read.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep}; it must be at least 1")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._saving: tuple[int, Any] | None = None
        self._cleaned = False
        import orbax.checkpoint.experimental.v1 as ocp

        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
        context = ocp.Context()
        context.checkpointables.registry = registry
        with _as_checkpoint_error(f"{self.directory}: cannot hold checkpoints"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.training.Checkpointer(str(self.directory), context=context)
            self._steps = {checkpoint.step for checkpoint in self._orbax.checkpoints}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns all steps with a checkpoint, ascending. Like `latest_step`, it waits for a running save."""
        self.wait()
        return sorted(self._steps)

    def latest_step(self) -> int | None:
        """Returns the last step with a checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata that were passed to `save`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged or has another format version.
        """
        self._check_exists(step)
        record = self._record(step)
        if _metadata_digest(record["metadata"]) != record["sha256"].get("metadata"):
            path = self.directory / str(step)
            raise DamagedError(f"{path}: damaged: its metadata differ from what was saved (SHA-256 mismatch)")
        return record["metadata"]

    def save(self, state: TrainState, data_state: Any, metadata: Mapping[str, Any]) -> None:
        """Starts saving a checkpoint of `state.step`, after the previous one is written.

        The state may be donated as soon as this returns. If the step was already saved with the same state, nothing is
        changed, including the metadata.

        Args:
          state: the training state.
          data_state: the JSON value that the iterator's `get_state()` returned.
          metadata: a JSON value that `restore` returns, such as the config and the best metric so far.

        Raises:
          CheckpointError: this or the previous checkpoint cannot be written (older ones are intact), the step was saved
            with another state, or the data state or the metadata is not JSON.
        """
        self.wait()
        self.remove_cut_off_saves()
        items = jax.tree.map(np.array, _items(state))  # Copied, since the buffers of the state may be donated.
        step = int(state.step)
        with _as_checkpoint_error(f"step {step}: data state and metadata must be JSON"):
            data, metadata = json.loads(json.dumps([{"state": data_state}, metadata]))  # Orbax does not accept None.
        record = {
            "format": FORMAT,
            "leaves": _described(items),
            "sha256": _digests(items, data, metadata),
            "metadata": metadata,
        }
        if step in self._steps:
            if self._record(step)["sha256"].get("state") != record["sha256"]["state"]:
                raise CheckpointError(f"{self.directory / str(step)} already exists, with another state")
            return
        with self._saving_reported(step):
            response = self._orbax.save_checkpointables_async(
                step,
                {**items, "data": data},
                force=True,
                custom_metadata=record,
            )
        self._saving = step, response
        if is_mirrored(self.directory):  # uploaded by `wait`, and not a whole interval later
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          CheckpointError: the last save failed; the checkpoints before it are intact.
        """
        if self._saving is None:
            return
        step, response = self._saving
        with self._saving_reported(step):
            response.result()
            if jax.process_index() == 0:
                sync_tree(self.directory / str(step))  # Orbax syncs only its arrays.
        self._saving = None
        self._steps.add(step)
        self._remove_old()
        changed(self.directory)

    def restore(self, step: int | None, like: TrainState) -> tuple[TrainState, Any, dict[str, Any]]:
        """Reads a checkpoint; all arrays are restored bit for bit.

        Args:
          step: the step; None for the latest.
          like: a state of the same structure, shapes and dtypes (arrays or `jax.ShapeDtypeStruct`s). The arrays are
            restored with its shardings, on any mesh.

        Returns:
          The state, the data state and the metadata that were passed to `save`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged or has another format version, or its state has
            another structure.
        """
        self.wait()
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory}: there is no checkpoint")
        self._check_exists(step)
        path = self.directory / str(step)
        record = self._record(step)
        items = jax.tree.map(_abstract, _items(like))
        _check_structure(path, record["leaves"], _described(items))
        # Loaded one by one: if one of several items cannot be read, Orbax never awaits the others' coroutines.
        loaded = {name: self._load(step, name, item) for name, item in items.items()}
        data = self._load(step, "data", None)
        if _digests(loaded, data, record["metadata"]) != record["sha256"]:
            raise DamagedError(f"{path}: damaged: its contents differ from what was saved (SHA-256 mismatch)")
        train = loaded["train"]
        state = TrainState(train["step"], loaded["prompt"], train["optimizer_state"])
        return state, data["state"], record["metadata"]

    def restore_intact(self, step: int | None, restore: Callable[[int], T]) -> T | None:
        """Restores the newest intact checkpoint, and removes those after it.

        Training is deterministic, so a run resumed from an earlier checkpoint recreates the same later ones.

        Args:
          step: restore the checkpoint of this step instead, even if later ones are intact.
          restore: called with steps, newest first, until it does not raise `DamagedError`.

        Returns:
          The result of `restore`; None if there is no checkpoint, or only a damaged one of step 0.

        Raises:
          CheckpointError: no checkpoint is intact, the one of `step` is damaged or missing, or `restore` raised it.
        """
        problem: DamagedError | None = None
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                found = restore(candidate)
            except DamagedError as error:
                problem = problem or error
                continue
            self._remove_after(candidate, problem)
            return found
        if step is None and self.steps() in ([], [0]):
            self._remove_after(-1, problem)  # no training is lost with step 0
            return None
        if step is None:
            raise CheckpointError(f"{problem}; no other is intact. Start over with --overwrite") from problem
        raise CheckpointError(f"{problem}; there are checkpoints of steps {self.steps()}") from problem

    def _remove_after(self, step: int, problem: DamagedError | None) -> None:
        later = [other for other in self.steps() if other > step]
        if problem is not None and jax.process_index() == 0:
            print(
                f"{shown(str(problem))}. Resuming from step {max(step, 0)}, the newest intact checkpoint",
                file=sys.stderr,
            )
        if later and jax.process_count() > 1:
            multihost_utils.sync_global_devices("restored")  # other processes may still be reading them
        self._remove(later)
        self._orbax.reload()  # Orbax has its own list of steps, and refuses to save a step twice.

    def close(self) -> None:
        """Waits for the last save, and releases threads and files.

        Raises:
          CheckpointError: the last save failed; the checkpoints before it are intact.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _check_exists(self, step: int) -> None:
        if step not in self._steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {self.steps()}")

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        try:
            return self._orbax.load_checkpointables(step, {name: abstract})[name]
        except (MemoryError, PermissionError) as error:  # the checkpoint itself may be intact
            raise CheckpointError(
                f"{self.directory / str(step)}: {name!r} cannot be read ({_reason(error)})"
            ) from error
        except Exception as error:  # TensorStore and Orbax raise many types, with messages of little help
            raise DamagedError(f"{self.directory / str(step)}: damaged: {name!r} cannot be read") from error

    def _record(self, step: int) -> dict[str, Any]:
        """Returns the checkpoint's metadata with its format version and digest."""
        path = self.directory / str(step)
        problem = f"{path}: damaged, or not a checkpoint of this library"
        try:
            record = self._orbax.checkpointables_metadata(step).custom_metadata
        except Exception as error:
            raise DamagedError(problem) from error
        if not isinstance(record, dict) or "format" not in record:
            raise DamagedError(problem)
        if record["format"] != FORMAT:
            version = record["format"]
            raise CheckpointError(f"{path}: format version {version!r} is unknown; this library knows {FORMAT}")
        if not isinstance(record.get("leaves"), dict) or not isinstance(record.get("sha256"), dict):
            raise DamagedError(problem)
        return {"metadata": None, **record}

    @contextlib.contextmanager
    def _saving_reported(self, step: int) -> Iterator[None]:
        """Turns a failed save into a CheckpointError, and removes the incomplete checkpoint; older ones are intact."""
        try:
            with _as_checkpoint_error(f"{self.directory / str(step)}: the checkpoint was not saved"):
                yield
        except CheckpointError as error:
            self._saving = None
            with contextlib.suppress(Exception):  # Orbax raises the same error again in each thread that waits.
                self._orbax.wait()
            self._cleaned = False
            self.remove_cut_off_saves()
            self._cleaned = False  # Threads of the failed save may still be writing; the next save cleans up again.
            latest = self.latest_step()
            intact = "there was none before it" if latest is None else f"the one of step {latest} is intact"
            raise CheckpointError(f"{error}; {intact}") from error.__cause__

    def _remove_old(self) -> None:
        """Removes all but the last few checkpoints."""
        self._remove(self.steps()[: -self._keep])

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes checkpoints, renaming each first so that a partially removed one is never listed."""
        for step in steps:
            self._steps.remove(step)
            if jax.process_index() == 0:
                path = self.directory / str(step)
                with _as_checkpoint_error(f"{path}: the old checkpoint cannot be removed"):
                    shutil.rmtree(path.rename(f"{path}{_TEMPORARY}-removed"))

    def remove_cut_off_saves(self) -> None:
        """Removes files of killed or failed saves. Not called on opening, since another process may be saving."""
        if not self._cleaned and jax.process_index() == 0:
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)
        self._cleaned = True


class NoCheckpoints(Checkpoints):
    """Checkpoints that are not written, for a run without a work directory."""

    def __init__(self) -> None:
        self.directory = Path()

    def steps(self) -> list[int]:
        return []

    def save(self, state: TrainState, data_state: Any, metadata: Mapping[str, Any]) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def remove_cut_off_saves(self) -> None:
        pass


def _items(state: TrainState) -> dict[str, Any]:
    return {"prompt": state.params, "train": {"step": state.step, "optimizer_state": state.optimizer_state}}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _leaves(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _digests(items: Any, data: Any, metadata: Any) -> dict[str, str]:
    """Returns the SHA-256 of the state that training resumes from, and of the metadata."""
    state = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name, leaf in sorted(_leaves(items).items()):
        array = np.asarray(leaf)
        state.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return {
        "state": state.hexdigest(),
        "metadata": _metadata_digest(metadata),
    }


def _metadata_digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _described(items: Any) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _leaves(items).items()}


def _check_structure(path: Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Checks all leaves. Orbax would silently cast another dtype, and does not name leaves when trees differ."""
    for name in sorted(saved | expected):
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path}: {name} is {saved.get(name, 'absent')} in the checkpoint, {expected.get(name, 'absent')} in"
                " this run; the checkpoint is of another method, length, base or optimizer"
            )


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Turns any error into a CheckpointError: Orbax and TensorStore raise many types, from OSError to ValueError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    if number in DISK_FULL or any(os.strerror(code) in str(error) for code in DISK_FULL):
        return "the disk is full, or a limit on it is reached"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
