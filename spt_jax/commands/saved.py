"""Helpers of the commands that read a saved prompt."""

from collections.abc import Sequence
from pathlib import Path

from spt_jax.bases.base import FrozenBase, load_base, local_directory
from spt_jax.commands.options import Saved
from spt_jax.errors import CheckpointError, RemoteError, did_you_mean
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.storage import INFO_FILE, SavedPrompt, load_prompt, read_prompt
from spt_jax.runtime.files import nearest_path, shown
from spt_jax.runtime.waits import spoken


def load(options: Saved) -> tuple[FrozenBase, SavedPrompt]:
    base, (saved,) = load_all(options, [options.prompt])
    return base, saved


def load_all(options: Saved, folders: Sequence[Path]) -> tuple[FrozenBase, list[SavedPrompt]]:
    """Returns the base of the first prompt, and all prompts."""
    info = read_prompt(folders[0]).info["base"]
    revision = None if options.base else info["revision"]
    if options.base is None:
        _check_base(info["id"], revision, folders[0])
    quantize = options.quantize
    if options.base is None and quantize is None:
        quantize = info["fingerprint"].get("quantize")
    name = options.base or info["id"]
    with spoken(f"loading {name}"):
        base = load_base(name, revision=revision, dtype=options.dtype, quantize=quantize)
    return base, [load_prompt(folder, base, force=options.force) for folder in folders]


def named(options: Saved, names: Sequence[str]) -> list[Path]:
    """Returns the directories of the prompts with these names in the folder `prompt`.

    Raises:
      CheckpointError: the folder has no prompts, or none with one of the names.
    """
    known = bank_of(options.prompt)
    for name in names:
        if name not in known:
            raise CheckpointError(f"{options.prompt}: there is no prompt {name!r}; {did_you_mean(name, known)}")
    return [known[name] for name in names]


def _check_base(name: str, revision: str | None, prompt: Path) -> None:
    """Refuses a base that is not where it was when the prompt was saved.

    Raises:
      CheckpointError: it is not there; the message says what to do.
    """
    try:
        local_directory(name, revision)
    except (CheckpointError, RemoteError) as error:
        raise CheckpointError(
            f"{shown(prompt)}: the base of this prompt is not at {name!r} ({error}); say with --base where it is"
        ) from error


def bank_of(folder: Path) -> dict[str, Path]:
    """Returns the prompt directories of a folder by name, after a download if it is remote or on the hub.

    Raises:
      ConfigError, RemoteError: as in `prompt_directory`.
      CheckpointError: there are none.
    """
    folder = prompt_directory(folder)
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{INFO_FILE}"))}
    if not found:
        raise CheckpointError(f"{folder}: there are no saved prompts{nearest_path(folder)}")
    return found
