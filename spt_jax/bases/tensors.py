"""Files of named tensors, read one at a time: safetensors, also quantized, and GGUF by the keys of a family's table."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors

from spt_jax.bases.files import open_safetensors
from spt_jax.bases.gguf import GgufTensors
from spt_jax.bases.packed import Form, Packed
from spt_jax.bases.quantized_files import FileQuantization
from spt_jax.bases.quantized_files.opened import QuantizedCheckpoint
from spt_jax.bases.quantized_files.stored import FLOAT8, StoredTensors
from spt_jax.errors import CheckpointError

_FLOATS = ("float64", "float32", "bfloat16", "float16")


@runtime_checkable
class TensorFile(Protocol):
    """An open file of tensors."""

    def names(self) -> Iterable[str]:
        """Returns the names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns the values of a tensor, as floats.

        Raises:
          CheckpointError: it cannot be read, or holds something else.
        """
        ...


@runtime_checkable
class PackedFile(TensorFile, Protocol):
    """An open file of tensors some of which are stored in few bits."""

    def form(self, name: str) -> Form:
        """Returns how a tensor is stored, and None if as floats."""
        ...

    def read_packed(self, name: str) -> Packed:
        """Returns a tensor that can stay packed, as floats and as stored.

        Raises:
          CheckpointError: it cannot be read.
        """
        ...


class SafetensorsFile:
    """Implements `TensorFile`."""

    def __init__(self, file: Path, opened: Any) -> None:
        self._file, self._opened = file, opened

    def names(self) -> Iterable[str]:
        return self._opened.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._opened.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        floats = ", ".join(_FLOATS)
        try:
            if self._opened.get_slice(name).get_dtype() == FLOAT8:  # safetensors has no numpy type for it.
                raise CheckpointError(f"{self._file}: tensor {name!r} holds 8-bit floats; weights are {floats}")
            tensor = self._opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file}: tensor {name!r} cannot be read ({error})") from error
        if tensor.dtype.name not in _FLOATS:
            raise CheckpointError(f"{self._file}: tensor {name!r} holds {tensor.dtype}; weights are {floats}")
        return tensor


# Opens a file of tensors, given the keys of the family's table.
Opener = Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[TensorFile]]


@contextlib.contextmanager
def opener_of(files: Sequence[Path], quantization: FileQuantization | None) -> Iterator[Opener]:
    """Yields what opens the files of a checkpoint.

    Args:
      files: all of them.
      quantization: how config.json says that they are quantized; None for files that are read as they are.

    Raises:
      CheckpointError: a file is damaged, or quantized weights are not as the config says.
    """
    if quantization is None:
        yield open_tensors
        return
    with StoredTensors(files) as stored:
        yield QuantizedCheckpoint(stored, quantization).open


@contextlib.contextmanager
def open_tensors(file: Path, keys: Sequence[str]) -> Iterator[TensorFile]:
    """Opens a file of tensors.

    Args:
      file: in the format of safetensors, or of GGUF if its name ends with .gguf.
      keys: those of the family's table, by which tensors of a GGUF file are named.

    Raises:
      CheckpointError: the file is truncated, or its header damaged.
    """
    if file.suffix == ".gguf":
        yield GgufTensors(file, keys)
        return
    with open_safetensors(file) as opened:
        yield SafetensorsFile(file, opened)


def form_of(file: TensorFile, name: str) -> Form:
    """Returns how a tensor is stored, and None if as floats.

    Args:
      file: holds the tensor.
      name: of the tensor.
    """
    return file.form(name) if isinstance(file, PackedFile) else None


def read_packed(file: TensorFile, name: str) -> Packed:
    """Returns a tensor as floats, and as it is stored unless that is as floats.

    One whose form is a name must be of a GGUF file.

    Args:
      file: holds the tensor.
      name: of the tensor.

    Raises:
      CheckpointError: it cannot be read.
    """
    if isinstance(file, PackedFile) and file.form(name) is not None:
        return file.read_packed(name)
    return Packed(file.read(name))
