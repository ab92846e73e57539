"""Base class of the representations of a kernel: [L, D, F], of experts [L, E, D, F] or, of one layer, [D, F]."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from spt_jax.runtime.host_arrays import aligned_empty, put_on_devices
from spt_jax.runtime.sharding import fitting


class KernelArray:
    """A frozen kernel that is not a float array. Subclasses are registered dataclasses; all arrays have the
    axes before D.

    Every linear map of the layers goes through `matmul`, and no gradient is taken with respect to the arrays.
    """

    @classmethod
    def encode(cls, kernel: Float[np.ndarray, "D F"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the arrays that represent the kernel of one layer or expert, by the names of the fields.

        Args:
          kernel: float32 weights in host memory.

        Raises:
          ConfigError: the representation cannot hold a kernel of this shape.
        """
        raise NotImplementedError

    @classmethod
    def quantize(cls, kernel: Float[np.ndarray, "*L D F"], sharding: NamedSharding) -> "KernelArray":
        """Returns a float32 kernel in this representation, on devices.

        Args:
          kernel: the weights, in host memory.
          sharding: that of the float kernel.

        Raises:
          ConfigError: the representation cannot hold a kernel of this shape.
        """
        encoder = Encoder(cls, kernel.shape[:-2])
        for i in np.ndindex(kernel.shape[:-2]):
            encoder.add(i, kernel[i])
        return encoder.placed(sharding)

    def matmul(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Returns x @ kernel for the kernel of one layer, in the dtype of x.

        Args:
          x: the input of the linear map.
        """
        return _product(self, x)

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        raise NotImplementedError


class Encoder:
    """Encodes a stacked kernel one layer or expert at a time, so that few of its floats are in host memory."""

    def __init__(self, kind: type[KernelArray], leading: tuple[int, ...]):
        """Prepares for kernels of a representation; `leading` are the sizes of the axes before D."""
        self._kind, self._leading = kind, leading
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, index: tuple[int, ...], kernel: Float[np.ndarray, "D F"]) -> None:
        """Encodes the kernel at an index of the leading axes."""
        for name, array in self._kind.encode(kernel).items():
            if name not in self._arrays:
                self._arrays[name] = aligned_empty((*self._leading, *array.shape), array.dtype)
            self._arrays[name][index] = array

    def placed(self, sharding: NamedSharding) -> KernelArray:
        """Returns the kernel on devices, given the sharding of a float kernel."""
        return self._kind(**placed_arrays(self._arrays, len(self._leading) + 2, sharding))


def placed_arrays(arrays: Mapping[str, np.ndarray], rank: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the arrays of a kernel on devices.

    Each array is split as the axes that it has in common with the kernel. One with too few rows, such as the scales of
    groups of rows, is replicated along them.

    Args:
      arrays: by the names of the fields, in host memory.
      rank: the number of axes of the kernel.
      sharding: that of a float kernel.
    """
    return {name: put_on_devices(a, _sharding(a.shape, rank, sharding)) for name, a in arrays.items()}


def encoded_shapes(
    kind: type[KernelArray], shape: tuple[int, ...], sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a kernel's arrays, which are not computed.

    Args:
      kind: the representation.
      shape: of the kernel.
      sharding: that of the float kernel.

    Returns:
      The arrays, by the names of the fields.

    Raises:
      ConfigError: the representation cannot hold a kernel of this shape.
    """
    *leading, rows, columns = shape
    arrays = kind.encode(np.zeros((rows, 1), np.float32))  # channels are independent of each other
    shapes = {name: (*leading, *array.shape[:-1], columns) for name, array in arrays.items()}
    return {
        name: jax.ShapeDtypeStruct(own, arrays[name].dtype, sharding=_sharding(own, len(shape), sharding))
        for name, own in shapes.items()
    }


def _sharding(shape: tuple[int, ...], rank: int, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of an array of a kernel with `rank` axes: that of the axes they share."""
    *leading, rows, columns = (*sharding.spec, *(None,) * rank)[:rank]
    spec = (*leading, rows, columns) if len(shape) == rank else (*leading, columns)
    return fitting(sharding.mesh, PartitionSpec(*spec), shape)


@jax.custom_vjp
def _product(kernel: KernelArray, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """Returns x @ kernel. The backward pass makes the kernel dense again: a saved copy would be one of every layer."""
    return jnp.dot(x, kernel.dense().astype(x.dtype))


def _forward(kernel: KernelArray, x: Array) -> tuple[Array, KernelArray]:
    return _product(kernel, x), kernel


def _backward(kernel: KernelArray, cotangent: Array) -> tuple[None, Array]:
    return None, jnp.dot(cotangent, kernel.dense().astype(cotangent.dtype).T)


_product.defvjp(_forward, _backward)
