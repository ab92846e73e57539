"""The tensors of all safetensors files of a checkpoint, as stored, and the weights that they are the parts of."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from spt_jax.bases.files import open_safetensors
from spt_jax.bases.packed import Kept
from spt_jax.errors import CheckpointError

FLOATS = ("F64", "F32", "BF16", "F16")
FLOAT8 = "F8_E4M3"
_FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about a tensor.

    Attributes:
      file: the file that holds it.
      dtype: by its name in safetensors files, such as "I32".
      shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight that is computed from several stored tensors.

    Attributes:
      shape: of the weight.
      parts: names of the tensors; the weight counts as one of the file that holds the first.
      values: returns the weight, in C order, from the tensors as stored, in the order of `parts`.
      kept: how the weight stays packed on the devices, if it can.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    values: Callable[..., np.ndarray]
    kept: Kept | None = None


class StoredTensors:
    """Open safetensors files. A module's tensors can be in several of them. Use it as a context manager.

    Attributes:
      headers: of all tensors, by name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Opens the files.

        Args:
          files: the files.

        Raises:
          CheckpointError: a file is damaged, or two have a tensor of the same name.
        """
        self.headers: dict[str, Header] = {}
        self._opened: dict[Path, Any] = {}
        self._float8: dict[Path, dict[str, int]] = {}
        with contextlib.ExitStack() as stack:
            for file in files:
                opened = self._opened[file] = stack.enter_context(open_safetensors(file))
                for name in list(opened.keys()):
                    if name in self.headers:
                        other = self.headers[name].file.name
                        raise CheckpointError(f"tensor {name!r} is in both {other} and {file.name}")
                    part = opened.get_slice(name)
                    self.headers[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
            self._stack = stack.pop_all()

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as stored; the bytes of one in 8-bit floats.

        Raises:
          CheckpointError: it cannot be read.
        """
        header = self.headers[name]
        try:
            if header.dtype == FLOAT8:
                return self._bytes(name, header)
            return self._opened[header.file].get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{header.file}: tensor {name!r} cannot be read ({error})") from error

    def _bytes(self, name: str, header: Header) -> np.ndarray:
        """Reads what safetensors has no numpy type for, by the offsets that it checked when it opened the file."""
        if header.file not in self._float8:
            with open(header.file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                entries = json.loads(stream.read(size))
            self._float8[header.file] = {
                own: 8 + size + entry["data_offsets"][0]
                for own, entry in entries.items()
                if entry.get("dtype") == FLOAT8
            }
        count = int(np.prod(header.shape, dtype=np.int64))
        found = np.fromfile(header.file, np.uint8, count=count, offset=self._float8[header.file][name])
        return found.reshape(header.shape)

    def refused(self, name: str, what: str) -> CheckpointError:
        """Returns the error for a tensor, given what is wrong with it."""
        return CheckpointError(f"{self.headers[name].file}: tensor {name!r} {what}")

    def part(self, name: str, suffix: str, other: str, dtypes: Sequence[str], axes: int) -> Header:
        """Returns the header of a part of a weight, after checking it.

        Args:
          name: what the names of the parts start with.
          suffix: what the name of this part ends with.
          other: what the name of a part ends with that is known to exist.
          dtypes: those that it can have.
          axes: the number of axes that it must have.

        Raises:
          CheckpointError: it is missing, or has another dtype or number of axes.
        """
        header = self.headers.get(name + suffix)
        if header is None:
            raise self.refused(name + other, f"is in the file, and {name + suffix!r} is missing")
        if header.dtype not in dtypes:
            raise self.refused(name + suffix, f"holds {header.dtype}; it must be {' or '.join(dtypes)}")
        if len(header.shape) != axes or 0 in header.shape:
            raise self.refused(name + suffix, f"has shape {header.shape}; it must have {axes} axes, none empty")
        return header

    def check_shape(self, name: str, shape: tuple[int, ...], why: str) -> None:
        """Checks the shape of a tensor.

        Args:
          name: the tensor.
          shape: what it must be.
          why: what it follows from.

        Raises:
          CheckpointError: it is another one.
        """
        stored = self.headers[name].shape
        if stored != shape:
            raise self.refused(name, f"has shape {stored}, and must have {shape}: {why}")

    def modules(self, suffix: str) -> list[str]:
        """Returns what is before `suffix` in the names that end with it."""
        return [name.removesuffix(suffix) for name in self.headers if name.endswith(suffix)]


def check_parts(stored: StoredTensors, modules: Sequence[str], main: str, others: Sequence[str]) -> None:
    """Checks that no module has some parts of a weight without the main one.

    Args:
      stored: the tensors.
      modules: those that have the main part.
      main: what its name ends with.
      others: what the names of the other parts end with.

    Raises:
      CheckpointError: a part without the main one.
    """
    known = set(modules)
    for suffix in others:
        for module in stored.modules(suffix):
            if module not in known:
                raise stored.refused(module + suffix, f"is in the file, and {module + main!r} is missing")


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Returns the codes of 32-bit words, the lowest bits first, along a new last axis.

    Args:
      packed: int32 words [...].
      bits: of a code; a divisor of 8.

    Returns:
      uint8 codes [..., 32 / bits].
    """
    octets = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8).reshape(*packed.shape, 4)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (octets[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape, 32 // bits)


def float8_values(stored: np.ndarray) -> np.ndarray:
    """Returns the float32 values of the bytes of E4M3 floats."""
    return _FLOAT8_VALUES[stored]


def setting(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Returns a field of a `quantization_config`; the default where it is missing or null."""
    value = fields.get(name)
    return default if value is None else value
