"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) as AutoGPTQ and GPTQModel store it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from spt_jax.bases.quantized_files.grouped import Groups, Parts, with_kept
from spt_jax.bases.quantized_files.stored import (
    FLOATS,
    PackedWeight,
    StoredTensors,
    check_parts,
    setting,
    unpacked,
)
from spt_jax.errors import ConfigError

# Rows of codes that are unpacked at once: they fit in a cache, and take little memory beside the weight itself.
_ROWS = 1 << 7


@dataclasses.dataclass(frozen=True)
class Gptq:
    """Implements `FileFormat`.

    For each group of input rows and output column there are a scale and a zero point: weight = (code - zero) * scale.
    `qweight` [in * bits / 32, out] packs codes along the rows, `qzeros` [groups, out * bits / 32] zero points along the
    columns; `g_idx` [in] is the group of each row, which is not in order if the rows were quantized by activation.

    Attributes:
      bits: of a code.
      group_size: input rows of a group; -1 for all.
      zero_offset: what is added to a stored zero point: 1 in the first version of the format.
    """

    quant_method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")

    bits: int
    group_size: int
    zero_offset: int

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "Gptq":
        bits, group_size = fields.get("bits"), setting(fields, "group_size", -1)
        if type(bits) is not int or bits not in (2, 4, 8):
            raise ConfigError(f"'bits' is {bits!r:.40}; GPTQ files of 2, 4 and 8 bits are read")
        check_group_size(group_size)
        stored_as = setting(fields, "checkpoint_format", setting(fields, "format", "gptq"))
        if stored_as not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
            stored_as = "marlin" if fields.get("is_marlin_format") else stored_as
            raise ConfigError(f"'checkpoint_format' is {stored_as!r:.40}; 'gptq' and 'gptq_v2' are read")
        dynamic = setting(fields, "dynamic", {})
        if not isinstance(dynamic, Mapping) or any(dynamic.values()):
            raise ConfigError("'dynamic' gives some modules other bits or groups, which is not supported")
        return cls(bits, group_size, int(stored_as == "gptq"))

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits, {group_note(self.group_size)}"

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        modules = stored.modules(".qweight")
        check_parts(stored, modules, ".qweight", (".qzeros", ".scales", ".g_idx"))
        return with_kept({f"{module}.weight": self._weight(stored, module) for module in modules}, self.bits)

    def _weight(self, stored: StoredTensors, module: str) -> tuple[PackedWeight, Groups]:
        per_word = 32 // self.bits
        packed_rows, columns = stored.part(module, ".qweight", ".qweight", ("I32",), 2).shape
        rows = packed_rows * per_word
        stored.part(module, ".scales", ".qweight", FLOATS, 2)
        stored.part(module, ".qzeros", ".qweight", ("I32",), 2)
        groups = 1 if self.group_size == -1 else -(-rows // self.group_size)
        why = f"'.qweight' has {rows} rows and {columns} columns of {self.bits} bits, {group_note(self.group_size)}"
        if columns % per_word:
            raise stored.refused(f"{module}.qweight", f"has {columns} columns; {per_word} must divide them")
        stored.check_shape(f"{module}.scales", (groups, columns), why)
        stored.check_shape(f"{module}.qzeros", (groups, columns // per_word), why)
        parts = tuple(module + suffix for suffix in (".qweight", ".qzeros", ".scales"))
        index = np.arange(rows) // (rows if self.group_size == -1 else self.group_size)
        if f"{module}.g_idx" in stored.headers:
            stored.part(module, ".g_idx", ".qweight", ("I32", "I64"), 1)
            stored.check_shape(f"{module}.g_idx", (rows,), why)
            index = stored.read(f"{module}.g_idx")
            if index.min() < 0 or index.max() >= groups:
                what = f"names groups {index.min()} to {index.max()}; there are {groups}"
                raise stored.refused(f"{module}.g_idx", what)
            parts = (*parts, f"{module}.g_idx")
        return PackedWeight((columns, rows), parts, partial(_values, self)), Groups(
            index, groups, partial(_parts, self)
        )


def check_group_size(size: object) -> None:
    """Checks a `group_size`.

    Raises:
      ConfigError: it is neither a positive integer nor -1.
    """
    if type(size) is not int or (size < 1 and size != -1):
        raise ConfigError(f"'group_size' is {size!r:.40}; it must be a positive integer, or -1 for one group")


def group_note(size: int) -> str:
    """Returns the end of a message about groups of a size."""
    return "one group" if size == -1 else f"groups of {size}"


def _zeros(how: Gptq, qzeros: np.ndarray) -> np.ndarray:
    """Returns the zero points, uint8 [groups, out]."""
    zeros = unpacked(qzeros, how.bits).reshape(len(qzeros), -1)
    # AutoGPTQ takes the sum modulo 2^bits: it stores the zero point 0 as the largest code.
    return (zeros + np.uint8(how.zero_offset)) & np.uint8((1 << how.bits) - 1)


def _codes(how: Gptq, qweight: np.ndarray) -> np.ndarray:
    """Returns the codes, uint8 [in, out]."""
    return unpacked(qweight, how.bits).swapaxes(1, 2).reshape(-1, qweight.shape[1])


def _parts(how: Gptq, qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, *_: np.ndarray) -> Parts:
    return _codes(how, qweight), _zeros(how, qzeros), scales


def _values(
    how: Gptq, qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray | None = None
) -> np.ndarray:
    """Returns the weight [out, in] in float32, in which products of 16-bit scales and codes are exact."""
    per_word = 32 // how.bits
    rows, columns = qweight.shape[0] * per_word, qweight.shape[1]
    size = rows if how.group_size == -1 else how.group_size
    groups = np.arange(rows) // size if g_idx is None else g_idx
    zeros, scales = _zeros(how, qzeros).astype(np.float32), scales.astype(np.float32)
    weight = np.empty((columns, rows), np.float32)
    for start in range(0, rows, _ROWS):
        codes = _codes(how, qweight[start // per_word : -(-min(start + _ROWS, rows) // per_word)])
        own = groups[start : start + len(codes)]
        weight[:, start : start + len(codes)] = ((codes - zeros[own]) * scales[own]).T
    return weight
