"""Host memory of kernels that are quantized while a checkpoint is read."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from jax.sharding import NamedSharding

from spt_jax.models.quantized import KernelArray
from spt_jax.models.quantized.kernel_array import Encoder
from spt_jax.runtime.host_arrays import aligned_empty


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
