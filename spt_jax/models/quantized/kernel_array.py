"""Base class of the representations of a kernel: [L, D, F], of experts [L, E, D, F] or, of one layer, [D, F]."""

import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float


class KernelArray:
    """A frozen kernel that is not a float array. Subclasses are registered dataclasses; all arrays have the
    axes before D.

    Every linear map of the layers goes through `matmul`, and no gradient is taken with respect to the arrays.
    """

    @classmethod
    def quantize(cls, kernel: Float[np.ndarray, "*L D F"], sharding: NamedSharding) -> "KernelArray":
        """Returns a float32 kernel in this representation, on devices.

        Args:
          kernel: the weights, in host memory.
          sharding: that of the float kernel.
        """
        raise NotImplementedError

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x @ kernel for the kernel of one layer, in the dtype of x.

        Args:
          x: the input of the linear map.
        """
        raise NotImplementedError

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        raise NotImplementedError
