"""Two 4-bit codes per byte, and groups of rows that share a scale.

Codes are packed into uint8: `jnp.int4` is stored packed by some versions of XLA and devices only, and an array of it
reports a byte per code everywhere.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from spt_jax.errors import ConfigError


def group_rows(rows: int, limit: int, name: str) -> int:
    """Returns the number of rows of a group: the largest even divisor of `rows` that is at most `limit`.

    Args:
      rows: the number of rows D of a kernel.
      limit: the largest group.
      name: of the representation, for the error.

    Raises:
      ConfigError: `rows` is odd, so that pairs of rows cannot share bytes.
    """
    if rows % 2:
        raise ConfigError(f"{name} packs pairs of input features, and a kernel of this base has {rows}; use int8")
    return max(size for size in range(2, min(rows, limit) + 1, 2) if rows % size == 0)


def pack(codes: UInt8[np.ndarray, "D F"]) -> UInt8[np.ndarray, "Dh F"]:
    """Packs codes in [0, 16) of rows 2i and 2i + 1 into the low and high bits of byte i."""
    return codes[0::2] | (codes[1::2] << 4)


def unpack(packed: UInt8[Array, "*L Dh F"]) -> UInt8[Array, "*L D F"]:
    """Returns the codes that `pack` was given."""
    *leading, pairs, columns = packed.shape
    return jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*leading, 2 * pairs, columns)
