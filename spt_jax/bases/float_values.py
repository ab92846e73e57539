"""The values of tensors in host memory: chunks of them, casts, and checks."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from spt_jax.errors import CheckpointError


def chunks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the values in order, in flat chunks that fit in a processor's cache.

    Args:
      tensor: of any shape.
    """
    flat, step = np.ascontiguousarray(tensor).reshape(-1), (128 << 10) // tensor.dtype.itemsize
    return (flat[start : start + step] for start in range(0, flat.size, step))


def is_finite(chunk: np.ndarray) -> bool:
    """Returns whether all values are finite. Compares the largest bit patterns, which is faster than `np.isfinite`.

    Args:
      chunk: floats.
    """
    size = chunk.dtype.itemsize
    bits, infinity = chunk.view(f"u{size}"), int(np.asarray(np.inf, chunk.dtype).view(f"u{size}"))
    return bool(bits.max() < infinity + (1 << 8 * size - 1) and bits.view(f"i{size}").max() < infinity)


def cast_into(target: np.ndarray, values: np.ndarray, source: str) -> None:
    """Fills an array, whose precision may be lower than that of the values.

    Args:
      target: the array.
      values: of the same shape.
      source: where they are stored, for the error.

    Raises:
      CheckpointError: a value is beyond the range of that precision.
    """
    with np.errstate(over="ignore"):
        target[...] = values
    if jnp.finfo(target.dtype).max < jnp.finfo(values.dtype).max and not all(map(is_finite, chunks(target))):
        raise _beyond(target.dtype, source)


def check_range(dtype: np.dtype, values: np.ndarray, source: str) -> None:
    """Checks that values stay finite in a dtype, in which a packed kernel is used.

    Args:
      dtype: of the products.
      values: finite floats.
      source: where they are stored, for the error.

    Raises:
      CheckpointError: a value is beyond the range of the dtype.
    """
    largest = jnp.finfo(dtype).max
    if largest < jnp.finfo(values.dtype).max and max(values.max(), -values.min()) > largest:
        raise _beyond(dtype, source)


def _beyond(dtype: np.dtype, source: str) -> CheckpointError:
    return CheckpointError(f"{source} holds values beyond the range of {dtype}; set another base.dtype")
