"""Quantized checkpoints as files of the dequantized weights."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from spt_jax.bases.packed import Form, Packed
from spt_jax.bases.quantized_files import FileQuantization
from spt_jax.bases.quantized_files.stored import FLOATS, PackedWeight, StoredTensors
from spt_jax.errors import CheckpointError


class QuantizedCheckpoint:
    """The files of a quantized checkpoint. Each weight is computed when it is read, and none is kept."""

    def __init__(self, stored: StoredTensors, quantization: FileQuantization) -> None:
        """Finds the quantized weights and checks their parts.

        Args:
          stored: the tensors of all files.
          quantization: what config.json says.

        Raises:
          CheckpointError: there are none, parts of one are missing or wrong, or config.json says of one that it is
            not quantized.
        """
        how = quantization.how
        self._stored, self._how, self._packed = stored, how, how.weights(stored)
        if not self._packed:
            directory = next(iter(stored.headers.values())).file.parent if stored.headers else "the checkpoint"
            raise CheckpointError(
                f"{directory}: config.json says that weights are quantized ({how}), but no tensor has the names and"
                f" types of that; correct or remove its quantization_config"
            )
        for name, packed in self._packed.items():
            module = name.removesuffix(".weight")
            if listed := [plain for plain in quantization.plain if module == plain or module.endswith("." + plain)]:
                raise stored.refused(packed.parts[0], f"is quantized; config.json says that {listed[0]!r} is not")
            if name in stored.headers and name not in packed.parts:
                raise stored.refused(name, f"and {packed.parts[0]!r} are both in the checkpoint")
        self._parts = {part for packed in self._packed.values() for part in packed.parts}
        self._files = {name: stored.headers[packed.parts[0]].file for name, packed in self._packed.items()}

    @contextlib.contextmanager
    def open(self, file: Path, keys: Sequence[str]) -> Iterator["QuantizedFile"]:
        """Yields the weights of one of the files.

        Args:
          file: the file.
          keys: those of the family's table.
        """
        packed = {name: self._packed[name] for name, own in self._files.items() if own == file}
        plain = [
            name
            for name, header in self._stored.headers.items()
            if header.file == file and not self._is_part(name) and not self._is_empty_bias(name, keys)
        ]
        yield QuantizedFile(self._stored, packed, plain, str(self._how))

    def _is_part(self, name: str) -> bool:
        """Returns whether a tensor belongs to a quantized weight, also where its values are not needed."""
        if name in self._parts:
            return True
        return any(
            name.endswith(end) and f"{name.removesuffix(end)}.weight" in self._packed for end in self._how.suffixes
        )

    def _is_empty_bias(self, name: str, keys: Sequence[str]) -> bool:
        """Returns whether a tensor is one of the zero biases that AutoGPTQ adds to modules that have none."""
        if not name.endswith(".bias") or name in keys or f"{name.removesuffix('.bias')}.weight" not in self._packed:
            return False
        return self._stored.headers[name].dtype in FLOATS and not self._stored.read(name).any()


class QuantizedFile:
    """Implements `PackedFile`."""

    def __init__(self, stored: StoredTensors, packed: dict[str, PackedWeight], plain: Sequence[str], how: str) -> None:
        self._stored, self._packed, self._plain, self._how = stored, packed, plain, how

    def names(self) -> Iterable[str]:
        return [*self._packed, *self._plain]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._packed:
            return self._packed[name].shape
        header = self._stored.headers[name]
        if header.dtype not in FLOATS:
            raise self._stored.refused(name, f"holds {header.dtype}; weights that are not quantized are floats")
        return header.shape

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return self._stored.read(name)
        return self._values(self._packed[name], self._parts(name))

    def form(self, name: str) -> Form:
        return (self._packed[name].kept or self._how) if name in self._packed else None

    def read_packed(self, name: str) -> Packed:
        packed, parts = self._packed[name], self._parts(name)
        assert packed.kept is not None
        return Packed(self._values(packed, parts), packed.kept, packed.kept.arrays(*parts))

    def _parts(self, name: str) -> list[np.ndarray]:
        return [self._stored.read(part) for part in self._packed[name].parts]

    def _values(self, packed: PackedWeight, parts: Sequence[np.ndarray]) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # Weights that are not finite are refused by the caller.
            return packed.values(*parts)
