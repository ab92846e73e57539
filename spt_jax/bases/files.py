"""Finds and reads the files of a model directory. They are untrusted, so that sizes are bounded."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from spt_jax.errors import CheckpointError
from spt_jax.runtime.files import nearest_path

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# The link to a GGUF file, in the directory that is made of its metadata.
GGUF_LINK = "model.gguf"

# The largest files of public models are a tenth to a half of these. JSON takes up to 25 times its size when parsed.
CONFIG_BYTES = 4 << 20
INDEX_BYTES = 32 << 20
TOKENIZER_BYTES = 64 << 20


def read_json(file: Path, max_bytes: int) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      CheckpointError: it is larger than `max_bytes`, cannot be read, or holds something else.
    """
    try:
        size = file.stat().st_size
        content = json.loads(file.read_text(encoding="utf-8")) if size <= max_bytes else None
    except RecursionError:
        raise CheckpointError(f"{file}: JSON that is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if size > max_bytes:
        raise CheckpointError(f"{file}: {size:,} bytes; at most {max_bytes:,} are read")
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(content).__name__}, not an object")
    return content


def model_directory(path: Path) -> Path:
    """The directory itself.

    Raises:
      CheckpointError: `path` does not exist, or is a file of a model.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; set base.path to the model's directory, {path.parent}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory{nearest_path(path)}")
    return path


def config_file(directory: Path) -> Path:
    """The `config.json` of a model directory.

    Raises:
      CheckpointError: there is none; the message says what the directory holds.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no config.json{_instead(directory)}")
    return file


def gguf_source(directory: Path) -> Path | None:
    """Returns the GGUF file that a directory was made of; None for one of Hugging Face's files."""
    link = directory / GGUF_LINK
    return link.resolve() if link.is_symlink() else None


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of a model directory that hold its tensors: safetensors files, or one GGUF file.

    Raises:
      CheckpointError: no safetensors file, a damaged index, or a file named by it that is absent.
    """
    if (gguf := gguf_source(directory)) is not None:
        return [gguf]
    index = directory / INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            raise CheckpointError(f"{directory}: no {WEIGHTS} and no {INDEX}{_instead(directory)}")
        return [directory / WEIGHTS]
    names = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object that names the file of each tensor")
    for name in set(names.values()):
        if Path(name).name != name or "\0" in name or not (directory / name).is_file():
            raise CheckpointError(f"{directory}: {index.name} names {name[:200]!r}, which does not exist")
    return [directory / name for name in sorted(set(names.values()))]


def _instead(directory: Path) -> str:
    """Returns the end of a message about a missing file: what the directory holds, and what to do about it."""
    names = sorted(entry.name for entry in directory.iterdir())
    if "adapter_config.json" in names:
        return _adapter(directory)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"; {listed(gguf)} holds GGUF weights. Set base.path to such a file, {directory / gguf[0]}"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        what = "shards without their index" if len(shards) > 1 or "-of-" in shards[0] else "another name"
        return (
            f"; there is {listed(shards)} ({what}). Copy {INDEX} from where they come from, or rename a single file to"
            f" {WEIGHTS}"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"; {listed(pickles)} holds pickle weights, which can run code and are never read. Convert them once:"
            " AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW) with torch and transformers"
        )
    return f"; it holds {listed(names) or 'nothing'}"


def _adapter(directory: Path) -> str:
    base = read_json(directory / "adapter_config.json", CONFIG_BYTES).get("base_model_name_or_path")
    return (
        f"; it is a PEFT adapter of {str(base)[:200]!r}. Set base.path to that model; a soft prompt of PEFT's can then"
        " be imported with `spt-jax import`"
    )


def listed(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file, with numpy arrays.

    Raises:
      CheckpointError: the file is truncated, or its header damaged.
    """
    try:
        opened = safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged safetensors file ({error})") from error
    with opened as tensors:
        yield tensors
