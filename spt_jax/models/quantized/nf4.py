"""4-bit NormalFloat (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float, Shaped

from spt_jax.models.quantized.codebook import Codebook
from spt_jax.models.quantized.packing import group_rows, pack

BLOCK = 64
# The levels of QLoRA's appendix E: quantiles of the normal distribution, with an exact 0, scaled to [-1, 1].
LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4(Codebook):
    """LEVELS[code] * scale. Blocks have at most 64 rows, and the scale is the largest absolute value of one."""

    levels: tuple[float, ...] = dataclasses.field(default=LEVELS, metadata={"static": True})

    @classmethod
    def encode(cls, kernel: Float[np.ndarray, "D F"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the codes of the nearest levels, and the scales."""
        rows, columns = kernel.shape
        size = group_rows(rows, BLOCK, "nf4")
        levels = np.asarray(LEVELS, np.float32)
        limits = (levels[1:] + levels[:-1]) / 2
        packed = np.empty((rows // 2, columns), np.uint8)
        scale = np.empty((rows // size, columns), np.float32)
        for i, start in enumerate(range(0, rows, size)):
            block = kernel[start : start + size]
            scale[i] = np.maximum(np.abs(block).max(axis=0), np.finfo(np.float32).tiny)
            codes = np.searchsorted(limits, block / scale[i]).astype(np.uint8)
            packed[start // 2 : (start + size) // 2] = pack(codes)
        return {"packed": packed, "scale": scale}
