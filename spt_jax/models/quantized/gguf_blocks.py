"""Matrices in the blocks of GGUF files, packed as stored: 32 or 256 inputs of an output channel per block.

The numbers are those of `gguf.quants`, the reference of https://github.com/ggml-org/llama.cpp.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.models.quantized.table import TableArray

Bytes = UInt8[Array, "n b F"]
Values = Float[Array, "n v F"]


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How one type of tensor stores its blocks.

    Attributes:
      values: the number of values of a block.
      size: the number of bytes of a block.
      unpack: returns the values of blocks [n, size, F] as float32.
    """

    values: int
    size: int
    unpack: Callable[[Bytes], Values]


def _half(blocks: Bytes, start: int) -> Float[Array, "n 1 F"]:
    """Returns the float16 number at a byte of each block, as float32."""
    low, high = (blocks[:, start + i : start + i + 1].astype(jnp.uint16) for i in (0, 1))
    return jax.lax.bitcast_convert_type(low | (high << 8), jnp.float16).astype(jnp.float32)


def _nibbles(codes: Bytes) -> UInt8[Array, "n c F"]:
    """Returns the low halves of all bytes, then the high ones."""
    return jnp.concatenate([codes & 15, codes >> 4], axis=1)


def _fifth_bits(blocks: Bytes, start: int) -> UInt8[Array, "n 32 F"]:
    """Returns 16 times the 32 bits of the 4 bytes at `start`."""
    shifts = jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 8, 1)
    bits = (blocks[:, start : start + 4, None] >> shifts) & 1
    return bits.reshape(blocks.shape[0], 32, blocks.shape[2]) << 4


def _q4_0(blocks: Bytes) -> Values:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(jnp.float32) - 8)


def _q4_1(blocks: Bytes) -> Values:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(jnp.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Values:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(jnp.float32) - 16)


def _q5_1(blocks: Bytes) -> Values:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(jnp.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Values:
    return _half(blocks, 0) * jax.lax.bitcast_convert_type(blocks[:, 2:], jnp.int8).astype(jnp.float32)


def _eight_scales(packed: UInt8[Array, "n 12 F"]) -> tuple[Float[Array, "n 8 F"], Float[Array, "n 8 F"]]:
    """Returns eight 6-bit scales and eight 6-bit minima of 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = jnp.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = jnp.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(jnp.float32), minima.astype(jnp.float32)


def _of_eights(blocks: Bytes, codes: UInt8[Array, "n 8 32 F"]) -> Values:
    """Returns the values of codes whose eighths of a block have a scale and a minimum each."""
    scales, minima = _eight_scales(blocks[:, 4:16])
    scales, minima = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    values = scales[:, :, None] * codes.astype(jnp.float32) - minima[:, :, None]
    return values.reshape(blocks.shape[0], 256, blocks.shape[2])


def _four_bits(codes: UInt8[Array, "n 128 F"]) -> UInt8[Array, "n 8 32 F"]:
    """Returns the low halves of 32 bytes, their high halves, those of the next 32, ..."""
    pairs = codes.reshape(codes.shape[0], 4, 1, 32, codes.shape[2])
    return jnp.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(codes.shape[0], 8, 32, codes.shape[2])


def _q4_k(blocks: Bytes) -> Values:
    return _of_eights(blocks, _four_bits(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Values:
    fifth = (blocks[:, None, 16:48] >> jnp.arange(8, dtype=jnp.uint8).reshape(1, 8, 1, 1)) & 1
    return _of_eights(blocks, _four_bits(blocks[:, 48:]) | (fifth << 4))


def _q6_k(blocks: Bytes) -> Values:
    count, _, columns = blocks.shape
    low = blocks[:, :128].reshape(count, 2, 1, 64, columns)
    low = jnp.concatenate([low & 15, low >> 4], axis=2).reshape(count, 2, 4, 32, columns)
    shifts = jnp.asarray([0, 2, 4, 6], jnp.uint8).reshape(1, 1, 4, 1, 1)
    high = (blocks[:, 128:192].reshape(count, 2, 1, 32, columns) >> shifts) & 3
    codes = (low | (high << 4)).astype(jnp.float32).reshape(count, 16, 16, columns) - 32
    scales = jax.lax.bitcast_convert_type(blocks[:, 192:208], jnp.int8).astype(jnp.float32)
    scales = _half(blocks, 208) * scales
    return (scales[:, :, None] * codes).reshape(count, 256, columns)


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}


def unpacked(kind: str, units: UInt8[Array, "n b F"], rows: int) -> Float[Array, "D F"]:
    """Returns the values of a matrix.

    Args:
      kind: name of the type in `BLOCK_TYPES`.
      units: of each rows / n rows, the blocks; bytes after them are ignored.
      rows: the number of rows D.
    """
    block, (count, _, columns) = BLOCK_TYPES[kind], units.shape
    size = rows // count // block.values * block.size
    return block.unpack(units[:, :size].reshape(-1, block.size, columns)).reshape(rows, columns)


def packed_units(stored: UInt8[np.ndarray, "F B"], count: int, size: int) -> UInt8[np.ndarray, "n b F"]:
    """Returns what `unpacked` takes: the bytes of each output channel in `count` parts, each padded to `size` bytes."""
    units = stored.reshape(stored.shape[0], count, -1)
    return np.pad(units, ((0, 0), (0, 0), (0, size - units.shape[2]))).transpose(1, 2, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GgufKernel(KernelArray):
    """A kernel in the blocks of a GGUF file, as `--base.quantize keep` keeps it.

    Attributes:
      blocks: the blocks of each D / n rows and output channel, for the n rows that a block of every type divides. Of a
        stack whose layers have different types, as many bytes as the largest type needs.
      kind: of each layer, the index of its type in `kinds`.
      kinds: names of types in `BLOCK_TYPES`.
      rows: D.
    """

    blocks: UInt8[Array, "*L n b F"]
    kind: Int[Array, "*L"]
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})

    def dense(self) -> Float[Array, "*L D F"]:
        """Returns the kernel as a float32 array."""
        if self.kind.ndim:
            return jax.vmap(GgufKernel.dense)(self)
        if len(self.kinds) == 1:
            return unpacked(self.kinds[0], self.blocks, self.rows)
        branches = [lambda blocks, kind=kind: unpacked(kind, blocks, self.rows) for kind in self.kinds]
        return jax.lax.switch(self.kind, branches, self.blocks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GgufTable(TableArray):
    """An embedding table or output matrix in the blocks of a GGUF file.

    Attributes:
      blocks: the blocks along the D values of each token.
      kind: name of the type in `BLOCK_TYPES`.
      width: D.
      dtype: of the rows that `take` returns.
    """

    blocks: UInt8[Array, "*V b"]
    kind: str = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        return self.blocks.shape[0], self.width

    def dense(self) -> Float[Array, "*B D"]:
        """Returns the rows as a float32 array."""
        *leading, size = self.blocks.shape
        rows = unpacked(self.kind, self.blocks.reshape(-1, size).T[None], self.width).T
        return rows.reshape(*leading, self.width)
