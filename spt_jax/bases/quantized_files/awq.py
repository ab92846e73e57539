"""AWQ (Lin et al. 2023, arXiv 2306.00978) as AutoAWQ stores it for its GEMM kernels."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from spt_jax.bases.quantized_files.gptq import check_group_size, group_note
from spt_jax.bases.quantized_files.grouped import Groups, Parts, with_kept
from spt_jax.bases.quantized_files.stored import FLOATS, PackedWeight, StoredTensors, check_parts, setting, unpacked
from spt_jax.errors import ConfigError

# The column, of the eight of a word, of each of its codes, the lowest bits first.
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = len(_COLUMNS)
_ROWS = 1 << 7


@dataclasses.dataclass(frozen=True)
class Awq:
    """Implements `FileFormat`.

    For each group of input rows and output column there are a scale and a zero point: weight = (code - zero) * scale.
    `qweight` [in, out / 8] and `qzeros` [groups, out / 8] pack eight columns to a word, in an order of their own.

    Attributes:
      group_size: input rows of a group; -1 for all.
    """

    quant_method: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")

    group_size: int

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "Awq":
        bits = setting(fields, "bits", fields.get("w_bit"))
        if type(bits) is not int or bits != 4:
            raise ConfigError(f"'bits' is {bits!r:.40}; AWQ files of 4 bits are read")
        group_size = setting(fields, "group_size", setting(fields, "q_group_size", 128))
        check_group_size(group_size)
        names = ("version", "checkpoint_format", "format")
        version = next((fields[name] for name in names if fields.get(name) is not None), "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ConfigError(f"the version is {version!r:.40}; AWQ files of version 'gemm' are read")
        if setting(fields, "backend", "autoawq") == "llm-awq":
            raise ConfigError("'backend' is 'llm-awq', which packs weights in another order; 'autoawq' is read")
        if setting(fields, "zero_point", True) is not True:
            raise ConfigError(f"'zero_point' is {fields['zero_point']!r:.40}; AWQ files with zero points are read")
        return cls(group_size)

    def __str__(self) -> str:
        return f"AWQ, 4 bits, {group_note(self.group_size)}"

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        modules = stored.modules(".qweight")
        check_parts(stored, modules, ".qweight", (".qzeros", ".scales"))
        return with_kept({f"{module}.weight": self._weight(stored, module) for module in modules}, 4)

    def _weight(self, stored: StoredTensors, module: str) -> tuple[PackedWeight, Groups]:
        rows, words = stored.part(module, ".qweight", ".qweight", ("I32",), 2).shape
        stored.part(module, ".scales", ".qweight", FLOATS, 2)
        stored.part(module, ".qzeros", ".qweight", ("I32",), 2)
        columns, size = words * _PER_WORD, rows if self.group_size == -1 else self.group_size
        if rows % size:
            raise stored.refused(f"{module}.qweight", f"has {rows} rows; the group size {size} must divide them")
        why = f"'.qweight' has {rows} rows and {columns} columns of 4 bits, {group_note(self.group_size)}"
        stored.check_shape(f"{module}.scales", (rows // size, columns), why)
        stored.check_shape(f"{module}.qzeros", (rows // size, words), why)
        parts = tuple(module + suffix for suffix in (".qweight", ".qzeros", ".scales"))
        groups = Groups(np.arange(rows) // size, rows // size, _parts)
        return PackedWeight((columns, rows), parts, partial(_values, size)), groups


def _parts(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> Parts:
    return _codes(qweight), _codes(qzeros), scales


def _values(size: int, qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the weight [out, in] in float32, in which products of 16-bit scales and codes are exact."""
    rows, columns = len(qweight), scales.shape[1]
    zeros, scales = _codes(qzeros).astype(np.float32), scales.astype(np.float32)
    weight = np.empty((columns, rows), np.float32)
    for start in range(0, rows, _ROWS):
        codes = _codes(qweight[start : start + _ROWS])
        own = np.arange(start, start + len(codes)) // size
        weight[:, start : start + len(codes)] = ((codes - zeros[own]) * scales[own]).T
    return weight


def _codes(packed: np.ndarray) -> np.ndarray:
    codes = unpacked(packed, 4)
    ordered = np.empty_like(codes)
    ordered[..., list(_COLUMNS)] = codes
    return ordered.reshape(len(packed), -1)
