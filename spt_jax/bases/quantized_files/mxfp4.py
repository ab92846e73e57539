"""MXFP4 (OCP Microscaling Formats 1.0, 2023) as gpt-oss stores its experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from spt_jax.bases.packed import Kept
from spt_jax.bases.quantized_files.stored import PackedWeight, StoredTensors, check_parts
from spt_jax.models.quantized.codebook import Codebook

BLOCK = 32
# The values of E2M1, by code: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
# The two values of each byte, that of the low bits first.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)
_EXPONENT_BIAS, _NAN = 127, 255


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Implements `FileFormat`.

    Each block of 32 inputs has a power of two: `x_blocks` [experts, out, in / 32, 16] holds two values in each byte,
    `x_scales` [experts, out, in / 32] the exponents plus 127. The weight is `x` [experts, in, out].
    """

    quant_method: ClassVar[str] = "mxfp4"
    suffixes: ClassVar[tuple[str, ...]] = ("_blocks", "_scales")

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "Mxfp4":
        return cls()

    def __str__(self) -> str:
        return f"MXFP4, 4 bits, blocks of {BLOCK}"

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        names = stored.modules("_blocks")
        check_parts(stored, names, "_blocks", ("_scales",))
        return {name: self._weight(stored, name) for name in names}

    def _weight(self, stored: StoredTensors, name: str) -> PackedWeight:
        experts, rows, blocks, size = stored.part(name, "_blocks", "_blocks", ("U8",), 4).shape
        if size != BLOCK // 2:
            raise stored.refused(f"{name}_blocks", f"has blocks of {size} bytes; those of MXFP4 have {BLOCK // 2}")
        stored.part(name, "_scales", "_blocks", ("U8",), 3)
        stored.check_shape(f"{name}_scales", (experts, rows, blocks), "one for each block")
        kept = Kept(Codebook, ("packed", "scale"), _arrays, (("levels", tuple(_VALUES.tolist())),))
        return PackedWeight((experts, blocks * BLOCK, rows), (f"{name}_blocks", f"{name}_scales"), _values, kept)


def _arrays(blocks: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a `Codebook` kernel, whose pairs of rows are those of the file."""
    packed = blocks.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)
    exponents = scales.swapaxes(1, 2).astype(np.int32) - _EXPONENT_BIAS
    return {"packed": packed, "scale": np.ldexp(np.float32(1), exponents).astype(jnp.bfloat16)}


def _values(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the weight [experts, in, out] in bfloat16, in which it is exact."""
    experts, rows, count, _ = blocks.shape
    weight = np.empty((experts, count * BLOCK, rows), jnp.bfloat16)
    for expert in range(experts):
        exponents = scales[expert].astype(np.int32)[..., None] - _EXPONENT_BIAS
        values = _PAIRS[blocks[expert]].reshape(rows, count, BLOCK)
        values[scales[expert] == _NAN] = np.nan
        weight[expert] = np.ldexp(values, exponents).reshape(rows, -1).T
    return weight
