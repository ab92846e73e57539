"""Host memory of kernels that are quantized, or packed already, while a checkpoint is read."""

from collections import Counter
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import UInt8

from spt_jax.models.quantized import KernelArray
from spt_jax.models.quantized.gguf_blocks import BLOCK_TYPES, GgufKernel, GgufTable, packed_units
from spt_jax.models.quantized.kernel_array import Encoder
from spt_jax.runtime.host_arrays import aligned_empty, put_on_devices
from spt_jax.runtime.sharding import fitting


class KernelBuffer:
    """A float32 kernel [*L, D, F] of which only the layers or experts that are being read are in memory."""

    def __init__(self, kind: type[KernelArray], shape: tuple[int, ...], indices: Iterable[tuple[int, ...]]):
        """Prepares for tensors that are stored at these indices of the leading axes, one or more at each.

        Args:
          kind: the representation.
          shape: of the kernel.
          indices: for each tensor or part of one, the place that it fills or is a part of.
        """
        indices = list(indices)
        self._shape, self._depth = shape, min(map(len, indices))
        self._encoder = Encoder(kind, shape[:-2])
        self._missing = Counter(index[: self._depth] for index in indices)
        self._parts: dict[tuple[int, ...], np.ndarray] = {}

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Returns the memory of a place, to be filled."""
        key = index[: self._depth]
        if key not in self._parts:
            self._parts[key] = aligned_empty(self._shape[self._depth :], np.float32)
        return self._parts[key][index[self._depth :]]

    def filled(self, index: tuple[int, ...]) -> None:
        """Counts a tensor; with the last one of a layer or expert, its floats are encoded and freed."""
        key = index[: self._depth]
        self._missing[key] -= 1
        if self._missing[key] == 0:
            part = self._parts.pop(key)
            for i in np.ndindex(part.shape[:-2]):
                self._encoder.add((*key, *i), part[i])

    def placed(self, sharding: NamedSharding) -> KernelArray:
        """Returns the quantized kernel on devices, given the sharding of a float kernel."""
        return self._encoder.placed(sharding)


class BlockBuffer:
    """A kernel [*L, D, F] in the blocks of a GGUF file, which stay packed."""

    def __init__(self, shape: tuple[int, ...], kinds: Iterable[str]):
        """Prepares for tensors of these types.

        Args:
          shape: of the kernel.
          kinds: names in `BLOCK_TYPES`; every type's block divides the rows.
        """
        self._leading, (self._rows, columns) = shape[:-2], shape[-2:]
        self._kinds = tuple(sorted(set(kinds)))
        blocks = [BLOCK_TYPES[kind] for kind in self._kinds]
        unit = max(block.values for block in blocks)
        self._units = self._rows // unit, max(unit // block.values * block.size for block in blocks)
        self._blocks = aligned_empty((*self._leading, *self._units, columns), np.uint8)
        self._kind = np.empty(self._leading, np.int32)

    def fill(self, index: tuple[int, ...], kind: str, stored: UInt8[np.ndarray, "F B"]) -> None:
        """Takes the blocks of a layer."""
        self._blocks[index] = packed_units(stored, *self._units)
        self._kind[index] = self._kinds.index(kind)

    def placed(self, sharding: NamedSharding) -> GgufKernel:
        """Returns the kernel on devices, given the sharding of a float kernel. Rows are split between blocks."""
        rank = len(self._leading) + 2
        *leading, rows, columns = (*sharding.spec, *(None,) * rank)[:rank]
        spec = fitting(sharding.mesh, PartitionSpec(*leading, rows, None, columns), self._blocks.shape)
        kind = fitting(sharding.mesh, PartitionSpec(*leading), self._leading)
        return GgufKernel(
            put_on_devices(self._blocks, spec), put_on_devices(self._kind, kind), kinds=self._kinds, rows=self._rows
        )


class BlockTableBuffer:
    """A table [V, D] in the blocks of a GGUF file, which stay packed."""

    def __init__(self, width: int, dtype: jnp.dtype):
        """Prepares for a table of rows of this width, which are used in a dtype."""
        self._width, self._dtype = width, dtype
        self._kind, self._blocks = "", np.empty((0, 0), np.uint8)

    def fill(self, kind: str, stored: UInt8[np.ndarray, "V B"]) -> None:
        """Takes the blocks of the whole table."""
        self._kind, self._blocks = kind, aligned_empty(stored.shape, np.uint8)
        self._blocks[...] = stored

    def placed(self, sharding: NamedSharding) -> GgufTable:
        """Returns the table on devices, given the sharding of a float table [V, D]."""
        spec = fitting(sharding.mesh, PartitionSpec(*sharding.spec[:1]), self._blocks.shape)
        return GgufTable(put_on_devices(self._blocks, spec), kind=self._kind, width=self._width, dtype=self._dtype)
