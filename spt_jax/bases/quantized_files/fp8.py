"""8-bit floats with a scale for each block of a matrix, as DeepSeek V3 (arXiv 2412.19437) stores them."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from spt_jax.bases.packed import Kept
from spt_jax.bases.quantized_files.stored import FLOAT8, FLOATS, PackedWeight, StoredTensors, check_parts, float8_values
from spt_jax.errors import ConfigError
from spt_jax.models.quantized import Fp8 as Fp8Kernel

_SCALES = ".weight_scale_inv"


@dataclasses.dataclass(frozen=True)
class Fp8:
    """Implements `FileFormat`.

    `weight` [out, in] holds E4M3 values, `weight_scale_inv` a factor for each block, or one for the whole matrix.
    Scales of activations are left out: activations are not rounded here.

    Attributes:
      block: rows and columns of a block; None for one factor for each matrix.
    """

    quant_method: ClassVar[str] = "fp8"
    suffixes: ClassVar[tuple[str, ...]] = (_SCALES, ".activation_scale")

    block: tuple[int, int] | None

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "Fp8":
        kind, block = fields.get("fmt"), fields.get("weight_block_size")
        if kind not in (None, "e4m3", "float8_e4m3fn"):
            raise ConfigError(f"'fmt' is {kind!r:.40}; fp8 files of 'e4m3' are read")
        if block is None:
            return cls(None)
        if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
            raise ConfigError(f"'weight_block_size' is {block!r:.40}; it must be two positive integers, or null")
        return cls((block[0], block[1]))

    def __str__(self) -> str:
        return "fp8, " + ("a scale for each matrix" if self.block is None else "blocks of {} x {}".format(*self.block))

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        modules = [
            name.removesuffix(".weight")
            for name, header in stored.headers.items()
            if name.endswith(".weight") and header.dtype == FLOAT8
        ]
        check_parts(stored, modules, ".weight (in 8-bit floats)", (_SCALES, ".activation_scale"))
        return {f"{module}.weight": self._weight(stored, module) for module in modules}

    def _weight(self, stored: StoredTensors, module: str) -> PackedWeight:
        rows, columns = stored.part(module, ".weight", ".weight", (FLOAT8,), 2).shape
        parts = (f"{module}.weight", f"{module}{_SCALES}")
        if self.block is None:
            header = stored.headers.get(parts[1])
            stored.part(module, _SCALES, ".weight", FLOATS, 0 if header is None else len(header.shape))
            if stored.headers[parts[1]].shape not in ((), (1,), (1, 1)):
                raise stored.refused(parts[1], f"has shape {stored.headers[parts[1]].shape}; it must be one number")
            return PackedWeight((rows, columns), parts, partial(_values, (rows, columns)), KEPT)
        stored.part(module, _SCALES, ".weight", FLOATS, 2)
        blocks = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        stored.check_shape(parts[1], blocks, f"the weight has shape {(rows, columns)}, blocks {self.block}")
        return PackedWeight((rows, columns), parts, partial(_values, self.block))


def _arrays(weight: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a kernel of which each output channel, or all of them, have a scale of their own."""
    scale = np.broadcast_to(scales.astype(np.float32).reshape(-1), len(weight))
    return {"values": weight.view(jnp.float8_e4m3fn).T, "scale": scale}


# How weights stay packed that have no groups of inputs.
KEPT = Kept(Fp8Kernel, ("values", "scale"), _arrays)


def _values(block: tuple[int, int], weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the products in float32 of the values, given as bytes, and the scales."""
    values = float8_values(weight)
    scales = scales.astype(np.float32).reshape(-(-weight.shape[0] // block[0]), -1)
    for at, row in enumerate(scales):
        rows = values[at * block[0] : (at + 1) * block[0]]
        rows *= np.repeat(row, block[1])[: weight.shape[1]]
    return values
