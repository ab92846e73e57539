"""4-bit integers with a scale and an offset per group of rows and output channel."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.models.quantized.packing import group_rows, pack, unpack

GROUP = 128
# The shares of a group's range that the codes cover at first, and how often least squares then improves the fit.
_SHARES = (1.0, 0.85)
_FITS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(KernelArray):
    """code * scale + offset, for codes of 0 to 15. G groups of at most 128 of the D rows share a scale and an offset.

    Attributes:
      packed: the codes, two rows per byte.
      scale: bfloat16, of each group and output channel.
      offset: bfloat16, the value of code 0 in each group and output channel.
    """

    packed: UInt8[Array, "*L Dh F"]
    scale: Float[Array, "*L G F"]
    offset: Float[Array, "*L G F"]

    @classmethod
    def encode(cls, kernel: Float[np.ndarray, "D F"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the codes, scales and offsets, chosen for a small squared error of each group."""
        rows, columns = kernel.shape
        size = group_rows(rows, GROUP, "int4")
        packed = np.empty((rows // 2, columns), np.uint8)
        scale = np.empty((rows // size, columns), jnp.bfloat16)
        offset = np.empty(scale.shape, jnp.bfloat16)
        for i, start in enumerate(range(0, rows, size)):
            codes, scale[i], offset[i] = _fitted(kernel[start : start + size])
            packed[start // 2 : (start + size) // 2] = pack(codes)
        return {"packed": packed, "scale": scale, "offset": offset}

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        codes = unpack(self.packed)
        *leading, groups, columns = self.scale.shape
        scale, offset = (a.astype(jnp.float32)[..., None, :] for a in (self.scale, self.offset))
        values = codes.reshape(*leading, groups, -1, columns).astype(jnp.float32) * scale + offset
        return values.reshape(codes.shape)


def _fitted(
    group: Float[np.ndarray, "g F"],
) -> tuple[UInt8[np.ndarray, "g F"], Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Returns codes, scales and offsets of one group.

    Codes are the nearest ones for a scale and an offset, which then become the least-squares fit of the codes. Of the
    starts, that with the smallest error is used for each channel.
    """
    low, high, mean = group.min(axis=0), group.max(axis=0), group.mean(axis=0)
    codes, scale, offset = (np.zeros(shape, np.float32) for shape in (group.shape, low.shape, low.shape))
    least = np.full(low.shape, np.inf, np.float32)
    for share in _SHARES:
        half = (high - low) * (share / 2)
        own_scale, own_offset = _rounded(2 * half / 15, (low + high) / 2 - half)
        own = _codes(group, own_scale, own_offset)
        for _ in range(_FITS):
            middle = own.mean(axis=0)
            centred = own - middle
            slope = (centred * (group - mean)).sum(axis=0) / np.maximum(np.square(centred).sum(axis=0), 1e-12)
            own_scale, own_offset = _rounded(slope, mean - slope * middle)
            own = _codes(group, own_scale, own_offset)
        error = np.square(own * own_scale + own_offset - group).sum(axis=0)
        better = error < least
        codes, scale = np.where(better, own, codes), np.where(better, own_scale, scale)
        offset, least = np.where(better, own_offset, offset), np.minimum(error, least)
    return codes.astype(np.uint8), scale, offset


def _codes(group: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # a group of equal values has a tiny scale
        return np.clip(np.rint((group - offset) / scale), 0, 15)


def _rounded(scale: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as the nearest bfloat16, in float32; scales are positive, also those of constant groups."""
    tiny = np.finfo(np.float32).tiny
    scale, offset = (a.astype(jnp.bfloat16).astype(np.float32) for a in (np.maximum(scale, tiny), offset))
    return scale, offset
