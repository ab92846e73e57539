"""NF4, FP4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) and int8 (LLM.int8, arXiv 2208.07339) of bitsandbytes."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from spt_jax.bases.packed import Kept
from spt_jax.bases.quantized_files.stored import FLOATS, PackedWeight, StoredTensors, check_parts
from spt_jax.errors import ConfigError
from spt_jax.models.quantized.codebook import Codebook

_STATE = ".weight.quant_state.bitsandbytes__"
_ABSMAX, _CODES = ".weight.absmax", ".weight.quant_map"
_NESTED_ABSMAX, _NESTED_CODES = ".weight.nested_absmax", ".weight.nested_quant_map"
_STATE_BYTES = 64 << 10
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
# Values that are computed at once; a multiple of two and of every size of a block.
_CHUNK = 1 << 20
# bitsandbytes multiplies by the float32 that is nearest to 1 / 127.
_INT8_STEP = np.float32(1 / 127)


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """Implements `FileFormat`.

    In 4 bits, `weight` has two codes in each byte, the high bits first, `quant_map` the value of each code, `absmax`
    the scale of each block of values in order, itself in 8 bits if `nested_absmax` is there, and `quant_state` the
    shape as JSON. In 8 bits, `weight` [out, in] holds integers and `SCB` [out] the largest magnitude of each row.

    Attributes:
      kind: "nf4", "fp4" or "int8".
    """

    quant_method: ClassVar[str] = "bitsandbytes"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(_STATE + kind for kind in ("nf4", "fp4")),
        *(_ABSMAX, _CODES, _NESTED_ABSMAX, _NESTED_CODES, ".SCB", ".weight_format"),
    )

    kind: Literal["nf4", "fp4", "int8"]

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> "BitsAndBytes":
        four = setting_flag(fields, "load_in_4bit", "_load_in_4bit")
        if four == setting_flag(fields, "load_in_8bit", "_load_in_8bit"):
            raise ConfigError("exactly one of 'load_in_4bit' and 'load_in_8bit' must be true")
        if not four:
            return cls("int8")
        kind = fields.get("bnb_4bit_quant_type") or "fp4"  # The default of transformers.
        if kind not in ("nf4", "fp4"):
            raise ConfigError(f"'bnb_4bit_quant_type' is {kind!r:.40}; 'nf4' and 'fp4' are read")
        return cls(kind)

    def __str__(self) -> str:
        return f"bitsandbytes, {self.kind}"

    def weights(self, stored: StoredTensors) -> dict[str, PackedWeight]:
        if self.kind == "int8":
            modules = stored.modules(".SCB")
            check_parts(stored, modules, ".SCB", (".weight_format",))
            return {f"{module}.weight": self._int8(stored, module) for module in modules}
        state = _STATE + self.kind
        modules = stored.modules(state)
        check_parts(stored, modules, state, (_ABSMAX, _CODES, _NESTED_ABSMAX, _NESTED_CODES))
        return {f"{module}.weight": self._four_bits(stored, module) for module in modules}

    def _int8(self, stored: StoredTensors, module: str) -> PackedWeight:
        rows, columns = stored.part(module, ".weight", ".SCB", ("I8",), 2).shape
        stored.part(module, ".SCB", ".SCB", FLOATS, 1)
        stored.check_shape(f"{module}.SCB", (rows,), f"the weight has {rows} rows")
        layout = f"{module}.weight_format"
        if layout in stored.headers and (found := stored.read(layout)).tolist() not in (0, [0]):
            raise stored.refused(layout, f"is {found.tolist()!r:.40}; weights in rows (0) are read")
        return PackedWeight((rows, columns), (f"{module}.weight", f"{module}.SCB"), _int8_values)

    def _four_bits(self, stored: StoredTensors, module: str) -> PackedWeight:
        name = module + _STATE + self.kind
        state = _QuantState.from_stored(stored, name)
        count = math.prod(state.shape)
        packed = stored.headers.get(f"{module}.weight")
        if packed is None:
            raise stored.refused(name, f"is in the file, and {module + '.weight'!r} is missing")
        size = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}.get(packed.dtype)
        if size is None or math.prod(packed.shape) * size != -(-count // 2):
            what = f"holds {packed.dtype} of shape {packed.shape}; {count} codes of 4 bits take {-(-count // 2)} bytes"
            raise stored.refused(f"{module}.weight", what)
        blocks = -(-count // state.blocksize)
        scale_types = ("U8",) if state.nested_blocksize else ("F32",)
        stored.part(module, _ABSMAX, ".weight", scale_types, 1)
        why = f"the quantization state has {count} values in blocks of {state.blocksize}"
        stored.check_shape(module + _ABSMAX, (blocks,), why)
        stored.part(module, _CODES, ".weight", ("F32",), 1)
        stored.check_shape(module + _CODES, (16,), "one for each code of 4 bits")
        parts = (f"{module}.weight", module + _CODES, module + _ABSMAX)
        if state.nested_blocksize:
            stored.part(module, _NESTED_ABSMAX, ".weight", ("F32",), 1)
            stored.part(module, _NESTED_CODES, ".weight", ("F32",), 1)
            stored.check_shape(module + _NESTED_ABSMAX, (-(-blocks // state.nested_blocksize),), why)
            stored.check_shape(module + _NESTED_CODES, (256,), "one for each code of 8 bits")
            parts = (*parts, module + _NESTED_CODES, module + _NESTED_ABSMAX)
        elif module + _NESTED_ABSMAX in stored.headers:
            raise stored.refused(module + _NESTED_ABSMAX, "is in the file, and the quantization state is not nested")
        kept = None
        if state.shape[1] % state.blocksize == 0:
            levels = tuple(stored.read(module + _CODES).tolist())
            rounded = None if state.dtype == "float32" else jnp.dtype(_DTYPES[state.dtype])
            options = (("levels", levels), ("rounded", rounded))
            kept = Kept(Codebook, ("packed", "scale"), partial(_four_bit_arrays, state), options)
        return PackedWeight(state.shape, parts, partial(_four_bit_values, state), kept)


def setting_flag(fields: Mapping[str, Any], *names: str) -> bool:
    """Returns whether a field of a `quantization_config` is true, by the first of its names that is there."""
    return next((bool(fields[name]) for name in names if name in fields), False)


@dataclasses.dataclass(frozen=True)
class _QuantState:
    """The JSON of a `quant_state`.

    Attributes:
      shape: of the weight.
      dtype: of the weight, which bitsandbytes rounds to.
      blocksize: values that share a scale.
      nested_blocksize: scales that share a scale; 0 if scales are floats.
      nested_offset: what is added to nested scales.
    """

    shape: tuple[int, int]
    dtype: str
    blocksize: int
    nested_blocksize: int
    nested_offset: float

    @classmethod
    def from_stored(cls, stored: StoredTensors, name: str) -> "_QuantState":
        header = stored.headers[name]
        if header.dtype != "U8" or len(header.shape) != 1 or header.shape[0] > _STATE_BYTES:
            raise stored.refused(name, f"holds {header.dtype} of shape {header.shape}; it must be the bytes of JSON")
        try:
            fields = json.loads(stored.read(name).tobytes())
            shape, dtype, offset = tuple(fields["shape"]), fields["dtype"], fields.get("nested_offset", 0.0)
            sizes = fields["blocksize"], fields.get("nested_blocksize", 0)
            kind = fields["quant_type"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise stored.refused(name, f"is not a quantization state ({type(error).__name__}: {error})") from error
        wrong = {
            "quant_type": kind != name.rpartition("__")[2],
            "shape": len(shape) != 2 or any(type(n) is not int or not 0 < n < 1 << 31 for n in shape),
            "dtype": not isinstance(dtype, str) or dtype not in _DTYPES,
            "blocksize": not _is_power_of_two(sizes[0]),
            "nested_blocksize": sizes[1] != 0 and not _is_power_of_two(sizes[1]),
            "nested_offset": type(offset) not in (int, float) or not math.isfinite(offset),
        }
        if refused := next((field for field, is_wrong in wrong.items() if is_wrong), None):
            raise stored.refused(name, f"says {refused} is {fields.get(refused)!r:.60}, which is not supported")
        return cls(shape, dtype, *sizes, float(offset))


def _is_power_of_two(size: object) -> bool:
    return type(size) is int and 1 < size <= 1 << 16 and size & (size - 1) == 0


def _int8_values(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the weight [out, in] in float32."""
    values = weight.astype(np.float32)
    values *= scales.astype(np.float32)[:, None]
    values *= _INT8_STEP
    return values


def _four_bit_values(
    state: _QuantState,
    packed: np.ndarray,
    levels: np.ndarray,
    absmax: np.ndarray,
    nested_levels: np.ndarray | None = None,
    nested_absmax: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the weight [out, in], rounded as bitsandbytes rounds it."""
    absmax = _scales(state, absmax, nested_levels, nested_absmax)
    octets, count = np.ascontiguousarray(packed).reshape(-1).view(np.uint8), math.prod(state.shape)
    weight = np.empty(count, _DTYPES[state.dtype])
    for start in range(0, count, _CHUNK):
        own = octets[start // 2 : (start + _CHUNK) // 2]
        codes = np.stack([own >> 4, own & 15], axis=-1).reshape(-1)[: count - start]
        scales = absmax[start // state.blocksize : (start + _CHUNK) // state.blocksize]
        weight[start : start + codes.size] = levels[codes] * np.repeat(scales, state.blocksize)[: codes.size]
    return weight.reshape(state.shape)


def _four_bit_arrays(
    state: _QuantState, packed: np.ndarray, levels: np.ndarray, absmax: np.ndarray, *nested: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the arrays of a `Codebook` kernel, whose pairs of rows are those of the file, the other way around."""
    octets = np.ascontiguousarray(packed).reshape(-1).view(np.uint8).reshape(state.shape[0], -1)
    scales = _scales(state, absmax, *nested).reshape(state.shape[0], -1)
    return {"packed": ((octets >> 4) | (octets << 4)).T, "scale": scales.T}


def _scales(
    state: _QuantState,
    absmax: np.ndarray,
    nested_levels: np.ndarray | None = None,
    nested_absmax: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the float32 scale of each block."""
    if nested_levels is None or nested_absmax is None:
        return absmax
    outer = np.repeat(nested_absmax, state.nested_blocksize)[: absmax.size]
    return nested_levels[absmax] * outer + np.float32(state.nested_offset)
