"""GGUF files as bases: config, tokenizer and tensors as Hugging Face's files would hold them."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spt_jax.bases.files import GGUF_LINK
from spt_jax.bases.gguf_architectures import ROPE_TENSORS, Facts, architecture_of
from spt_jax.bases.gguf_header import read_bytes, read_tensor
from spt_jax.bases.gguf_parts import read_model
from spt_jax.bases.gguf_tokenizer import write_tokenizer
from spt_jax.bases.packed import Packed
from spt_jax.errors import CheckpointError
from spt_jax.runtime.extras import load_extra

_PREFIX = "spt_jax-gguf-"
FLOATS = ("F32", "F16", "BF16")


def gguf_directory(file: Path) -> Path:
    """Returns a directory with the file's config and tokenizer in Hugging Face format and a link to the file.

    It is a temporary directory, made once per file and process, and removed at the end of the process. Those of
    processes that were killed are removed as well.

    Args:
      file: the GGUF file, or the first part of a model in several files.

    Raises:
      CheckpointError: the file is damaged, or its architecture, tokenizer or a type of its tensors is not supported.
      ConfigError: the package gguf is not installed.
    """
    load_extra("gguf", f"reading {file.name}")
    file = file.resolve()
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return _directory(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _directory(file: Path, size: int, changed: int) -> Path:
    """`size` and `changed` tell versions of a file apart."""
    facts = Facts(file, read_model(file))
    config = architecture_of(facts).config(facts)
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    config |= write_tokenizer(directory, file, facts.architecture, facts.header.metadata)
    tokens = facts.header.metadata["tokenizer.ggml.tokens"]
    if isinstance(tokens, list) and len(tokens) > config["vocab_size"]:
        raise CheckpointError(
            f"{file}: {len(tokens)} tokens, but token_embd.weight has {config['vocab_size']} rows;"
            " convert the model again"
        )
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / GGUF_LINK).symlink_to(file)
    return directory


def _remove_abandoned() -> None:
    """Removes directories of this user's processes that have ended."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        process = directory.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            abandoned = process.isdigit() and directory.lstat().st_uid == os.getuid() and not _runs(int(process))
        except OSError:  # another process has removed it
            continue
        if abandoned:
            shutil.rmtree(directory, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


class GgufTensors:
    """Implements `TensorFile`: tensors by the keys of a family's table, with the shapes and values of transformers."""

    def __init__(self, file: Path, keys: Sequence[str]) -> None:
        self._facts = Facts(file, read_model(file))
        self._architecture = architecture_of(self._facts)
        stored = [name for name in self._facts.header.tensors if name not in ROPE_TENSORS]
        known = _stored_names(self._facts, keys)
        self._stored = {known.get(name, name): name for name in stored}

    def names(self) -> Iterable[str]:
        return self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        shape = self._facts.header.tensors[stored].shape
        return shape[::-1] if self._architecture.exchanges(stored) else shape

    def form(self, name: str) -> str | None:
        """Returns the name of the type of a tensor that is stored in blocks, and None for one of floats."""
        kind = self._facts.header.tensors[self._stored[name]].kind
        return None if kind in FLOATS else kind

    def read_packed(self, name: str) -> Packed:
        gguf = load_extra("gguf.quants", "reading GGUF files")
        stored = self._stored[name]
        tensor = self._facts.header.tensors[stored]
        rows = read_bytes(tensor).reshape(tensor.shape[0], -1)
        # All that an architecture restores in a matrix is the order of its rows.
        rows = self._architecture.restored(rows, stored, self._facts)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
        values = values.T if self._architecture.exchanges(stored) else values
        return Packed(values, tensor.kind, {"blocks": rows})

    def read(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        tensor = read_tensor(self._facts.header.tensors[stored])
        tensor = self._architecture.restored(tensor, stored, self._facts)
        return tensor.T if self._architecture.exchanges(stored) else tensor


def _stored_names(facts: Facts, keys: Sequence[str]) -> dict[str, str]:
    """Returns the key of each tensor's name, by the table of the gguf package."""
    gguf = load_extra("gguf", "reading GGUF files")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[facts.architecture], facts.layers())
    names = {table.get_name(key, try_suffixes=(".weight", ".bias")): key for key in keys}
    return {name: key for name, key in names.items() if name is not None}
