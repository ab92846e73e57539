"""Weights that files store in few bits, and what keeps them packed on the devices."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping

import numpy as np

from spt_jax.models.quantized import KernelArray


@dataclasses.dataclass(frozen=True)
class Kept:
    """How a weight of a quantized checkpoint becomes a `KernelArray` with the same numbers.

    Attributes:
      kind: the representation.
      names: of the fields of it that are arrays.
      arrays: returns these arrays from the stored parts of the weight, for the kernel [*E, D, F]; of those that have
        F, it is the last axis.
      options: the other fields of the representation, by name. Those of all layers must be equal.
    """

    kind: type[KernelArray]
    names: tuple[str, ...]
    arrays: Callable[..., Mapping[str, np.ndarray]]
    options: tuple[tuple[str, Hashable], ...] = ()

    def matches(self, other: "Kept") -> bool:
        """Returns whether weights of both can be layers of one kernel.

        Args:
          other: of another weight.
        """
        return (self.kind, self.names, self.options) == (other.kind, other.names, other.options)


# How a weight of a quantized checkpoint is kept, the name of the type of another one's blocks, or None for floats.
Form = str | Kept | None


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor of a checkpoint, and how it is stored.

    Attributes:
      values: its floats.
      form: how it is stored; None for floats.
      arrays: the blocks of each row, uint8 [F, bytes], as "blocks", or what `Kept.arrays` returned.
    """

    values: np.ndarray
    form: Form = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
