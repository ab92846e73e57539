"""Checkpoints of compressed-tensors, the library of LLM Compressor and vLLM, in 2, 4 and 8 bits."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from spt_jax.bases.quantized_files.fp8 import KEPT
from spt_jax.bases.quantized_files.grouped import Groups, Parts, with_kept
from spt_jax.bases.quantized_files.stored import (
    FLOAT8,
    FLOATS,
    PackedWeight,
    StoredTensors,
    check_parts,
    float8_values,
    setting,
    unpacked,
)
from spt_jax.errors import ConfigError

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_ZERO, _INDEX = ".weight_zero_point", ".weight_g_idx"
_ROWS = 1 << 7
_WHOLE = ("int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Implements `FileFormat`.

    Packed, `weight_packed` [out, in * bits / 32] holds codes that are 2^(bits - 1) more than the integers they stand
    for, `weight_shape` is [out, in], and zero points are packed along the rows. Otherwise `weight` holds 8-bit integers
    or E4M3 values. `weight_scale` has a factor for each tile of the matrix. Activations are not rounded here.

    Attributes:
      kind: "packed", "int" or "float".
      bits: of a value.
      tile: rows and columns that share a scale; None for all of them.
      symmetric: whether there are no zero points.
    """

    quant_method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(_PACKED, _SCALE, _SHAPE, _ZERO, _INDEX),
        *(".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point"),
    )

    kind: Literal["packed", "int", "float"]
    bits: int
    tile: tuple[int | None, int | None]
    symmetric: bool

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "CompressedTensors":
        for name in ("sparsity_config", "transform_config"):
            if (own := fields.get(name)) and not (isinstance(own, Mapping) and own.get("format") == "dense"):
                raise ConfigError(f"{name!r} is not supported")
        groups = fields.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ConfigError("'config_groups' must be an object that is not empty")
        if not all(isinstance(group, Mapping) for group in groups.values()):
            raise ConfigError("'config_groups' must hold objects")
        schemes = [(group.get("weights"), setting(group, "format", fields.get("format"))) for group in groups.values()]
        weights, form = schemes[0]
        if not isinstance(weights, Mapping) or any(other != schemes[0] for other in schemes):
            raise ConfigError("'config_groups' must quantize all weights alike, which is the only case that is read")
        kind, bits = setting(weights, "type", "int"), weights.get("num_bits")
        if form != "pack-quantized" and form not in _WHOLE:
            raise ConfigError(f"'format' is {form!r:.40}; read are {', '.join(('pack-quantized', *_WHOLE))}")
        supported = (2, 4, 8) if form == "pack-quantized" else (8,)
        if kind not in ("int", "float") or type(bits) is not int or bits not in supported:
            raise ConfigError(f"weights are {kind!r:.20} of {bits!r:.20} bits, which is not supported in {form!r}")
        if form == "pack-quantized" and kind != "int":
            raise ConfigError(f"weights are {kind!r} in 'pack-quantized', which is for integers")
        symmetric = setting(weights, "symmetric", True) is True
        if kind == "float" and not symmetric:
            raise ConfigError("zero points of float weights are not supported")
        return cls("packed" if form == "pack-quantized" else kind, bits, _tile(weights), symmetric)

    def __str__(self) -> str:
        tile = " x ".join("all" if size is None else str(size) for size in self.tile)
        return f"compressed-tensors, {'float' if self.kind == 'float' else 'int'}{self.bits}, a scale per {tile} values"

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        dtype = {"int": "I8", "float": FLOAT8}.get(self.kind)
        main = _PACKED if self.kind == "packed" else ".weight"
        modules = [
            module for module in stored.modules(main) if dtype is None or stored.headers[module + main].dtype == dtype
        ]
        check_parts(stored, modules, main, (_SCALE, _SHAPE, _ZERO, _INDEX))
        return with_kept({f"{module}.weight": self._weight(stored, module, main) for module in modules}, self.bits)

    def _weight(self, stored: StoredTensors, module: str, main: str) -> tuple[PackedWeight, Groups | None]:
        dtype = {"packed": "I32", "int": "I8", "float": FLOAT8}[self.kind]
        rows, columns = stored.part(module, main, main, (dtype,), 2).shape
        if self.kind == "packed":
            rows, columns = self._packed_shape(stored, module)
        height, width = (size or whole for size, whole in zip(self.tile, (rows, columns), strict=True))
        tiles = (-(-rows // height), -(-columns // width))
        scale = module + _SCALE
        stored.part(module, _SCALE, main, FLOATS, len(stored.headers[scale].shape) if scale in stored.headers else 0)
        # Scales of whole matrices and rows have an axis more or less, by the version of the library.
        if math.prod(tiles) != 1 or math.prod(stored.headers[scale].shape) != 1:
            stored.check_shape(scale, tiles, f"{main!r} is {rows} x {columns}, {self}")
        parts = (module + main, scale)
        if not self.symmetric:
            packed = self.kind == "packed"
            stored.part(module, _ZERO, main, ("I32",) if packed else ("I8",), 2)
            words = -(-tiles[0] * self.bits // 32) if packed else tiles[0]
            stored.check_shape(module + _ZERO, (words, tiles[1]), f"there are {tiles[0]} x {tiles[1]} scales")
            parts = (*parts, module + _ZERO)
        index = np.arange(columns) // width
        if module + _INDEX in stored.headers:
            stored.part(module, _INDEX, main, ("I32", "I64"), 1)
            stored.check_shape(module + _INDEX, (columns,), f"{main!r} has {columns} columns")
            index = stored.read(module + _INDEX)
            if index.min() < 0 or index.max() >= tiles[1]:
                what = f"names groups {index.min()} to {index.max()}; there are {tiles[1]}"
                raise stored.refused(module + _INDEX, what)
        weight = PackedWeight((rows, columns), parts, partial(_values, self, (rows, columns), height, index))
        if tiles[0] not in (1, rows) or (self.kind == "packed" and columns * self.bits % 32):
            return weight, None
        if self.kind == "float":
            return dataclasses.replace(weight, kept=KEPT if tiles[1] == 1 else None), None
        return weight, Groups(index, tiles[1], partial(_parts, self, height))

    def _packed_shape(self, stored: StoredTensors, module: str) -> tuple[int, int]:
        """Returns the shape of a packed weight, after checking that it agrees with the words."""
        stored.part(module, _SHAPE, _PACKED, ("I32", "I64"), 1)
        stored.check_shape(module + _SHAPE, (2,), "the weight has two axes")
        shape, words = stored.read(module + _SHAPE).tolist(), stored.headers[module + _PACKED].shape
        if shape[0] != words[0] or shape[1] < 1 or -(-shape[1] * self.bits // 32) != words[1]:
            what = f"is {shape}; {module + _PACKED!r} has shape {words}, {32 // self.bits} values to a word"
            raise stored.refused(module + _SHAPE, what)
        return shape[0], shape[1]


def _tile(weights: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns the rows and columns that share a scale; None for all of them."""
    size, block = weights.get("group_size"), weights.get("block_structure")
    default = "group" if type(size) is int and size > 0 else "channel" if size == -1 else "tensor"
    strategy = setting(weights, "strategy", default)
    if strategy not in _STRATEGIES:
        raise ConfigError(f"'strategy' is {strategy!r:.40}; read are {', '.join(_STRATEGIES)}")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise ConfigError(f"'group_size' is {size!r:.40}; it must be a positive integer")
    if strategy != "block":
        return {"tensor": (None, None), "channel": (1, None), "group": (1, size)}[strategy]
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise ConfigError(f"'block_structure' is {block!r:.40}; it must be two positive integers")
    return block[0], block[1]


def _values(
    how: CompressedTensors,
    shape: tuple[int, int],
    height: int,
    index: np.ndarray,
    stored: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the weight [out, in] in float32, in which products of 16-bit scales and 8-bit values are exact.

    Args:
      how: the format.
      shape: of the weight.
      height: rows that share a scale.
      index: the column of the scale of each column [in].
      stored: codes or values.
      scales: of each tile.
      zeros: zero points of each tile, as stored.
    """
    rows, columns = shape
    offset = np.int16(1 << (how.bits - 1)) if how.kind == "packed" else np.int16(0)
    scales = scales.astype(np.float32).reshape(-(-rows // height), -1)
    if zeros is not None and how.kind == "packed":
        zeros = unpacked(zeros, how.bits).swapaxes(1, 2).reshape(-1, zeros.shape[1])[: len(scales)] - offset
    weight = np.empty(shape, np.float32)
    for start in range(0, rows, _ROWS):
        own = stored[start : start + _ROWS]
        if how.kind == "float":
            values = float8_values(own)
        elif how.kind == "int":
            values = own.astype(np.float32)
        else:
            codes = unpacked(own, how.bits).reshape(len(own), -1)[:, :columns]
            values = (codes - offset).astype(np.float32)
        at = np.arange(start, start + len(own)) // height
        if zeros is not None:
            values -= zeros[at][:, index]
        weight[start : start + len(own)] = values * scales[at][:, index]
    return weight


def _parts(
    how: CompressedTensors, height: int, stored: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None
) -> Parts:
    """Returns the codes and groups of a weight of which each row, or all `height` rows, have scales of their own."""
    rows = len(stored)
    scales = scales.reshape(rows // height, -1)
    if how.kind == "packed":
        codes = unpacked(stored, how.bits).reshape(rows, -1)
        if zeros is not None:
            zeros = unpacked(zeros, how.bits).swapaxes(1, 2).reshape(-1, zeros.shape[1])[: len(scales)]
    else:
        codes, zeros = (None if a is None else (a.astype(np.int16) + 128).astype(np.uint8) for a in (stored, zeros))
    if zeros is None:
        zeros = np.full(scales.shape, 1 << (how.bits - 1), np.uint8)
    zeros, scales = (np.broadcast_to(a, (rows, a.shape[1])).T for a in (zeros, scales))
    assert codes is not None
    return codes.T, zeros, scales
