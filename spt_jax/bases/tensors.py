"""Files of named tensors, read one at a time: safetensors, and GGUF by the keys of a family's table."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from spt_jax.bases.files import open_safetensors
from spt_jax.bases.gguf import Blocks, GgufTensors
from spt_jax.errors import CheckpointError

_FLOATS = ("float64", "float32", "bfloat16", "float16")


class TensorFile(Protocol):
    """An open file of tensors."""

    def names(self) -> Iterable[str]:
        """Returns the names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without reading it."""
        ...

    def block_type(self, name: str) -> str | None:
        """Returns the name of the type of a tensor that is stored in blocks, and None for one of floats."""
        ...

    def read_blocks(self, name: str) -> Blocks:
        """Returns a tensor that is stored in blocks.

        Raises:
          CheckpointError: it cannot be read.
        """
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns the values of a tensor, as floats.

        Raises:
          CheckpointError: it cannot be read, or holds something else.
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

    def block_type(self, name: str) -> None:
        del name

    def read_blocks(self, name: str) -> Blocks:
        raise CheckpointError(f"{self._file}: tensor {name!r} is not stored in blocks")

    def read(self, name: str) -> np.ndarray:
        try:
            tensor = self._opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file}: tensor {name!r} cannot be read ({error})") from error
        if tensor.dtype.name not in _FLOATS:
            floats = ", ".join(_FLOATS)
            raise CheckpointError(f"{self._file}: tensor {name!r} holds {tensor.dtype}; weights are {floats}")
        return tensor


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
