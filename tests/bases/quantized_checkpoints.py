"""Quantized checkpoints, packed here value by value, beside plain ones of the values that the codes stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from spt_jax.testing import write_tiny_checkpoint

Tensors = dict[str, np.ndarray]
# Returns the stored tensors of a weight, by what their names end with, and the weight that they stand for.
Pack = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes [n, rest] into int32 words [n * bits / 32, rest], the first code in the lowest bits."""
    per_word = 32 // bits
    packed = np.zeros((len(codes) // per_word, codes.shape[1]), np.uint64)
    for i, row in enumerate(codes.astype(np.uint64)):
        packed[i // per_word] |= row << np.uint64(bits * (i % per_word))
    return packed.astype(np.uint32).view(np.int32)


def _grouped(weight: np.ndarray, groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes [in, out], zero points and float16 scales [groups, out] of a weight [out, in]."""
    columns, count, top = weight.T, groups.max() + 1, (1 << bits) - 1
    scales, zeros = np.zeros((count, len(weight)), np.float16), np.zeros((count, len(weight)), np.int64)
    codes = np.zeros(columns.shape, np.int64)
    for group in range(count):
        rows = columns[groups == group]
        low, high = rows.min(0), rows.max(0)
        scales[group] = (high - low) / top
        zeros[group] = np.clip(np.round(-low / scales[group].astype(np.float32)), 0, top)
        scaled = np.round(rows / scales[group].astype(np.float32)) + zeros[group]
        codes[groups == group] = np.clip(scaled, 0, top)
    return codes, zeros, scales


def gptq(bits: int, size: int, *, shuffled: bool = False, stored_offset: int = 1, index: bool = True) -> Pack:
    """Returns how GPTQ stores a weight; `stored_offset` is subtracted from zero points, modulo the number of codes."""

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        rows = weight.shape[1]
        groups = np.arange(rows) // (rows if size == -1 else size)
        if shuffled:
            groups = np.random.default_rng(rows).permutation(groups)
        codes, zeros, scales = _grouped(weight, groups, bits)
        values = (codes - zeros[groups]) * scales[groups].astype(np.float64)
        stored = {
            ".qweight": words(codes, bits),
            ".qzeros": words((zeros - stored_offset).T % (1 << bits), bits).T.copy(),
            ".scales": scales,
        }
        return stored | ({".g_idx": groups.astype(np.int32)} if index else {}), values.T.astype(np.float32)

    return pack


def awq(size: int) -> Pack:
    """Returns how AutoAWQ stores a weight for GEMM: its `order_map` says which column is in each place of a word."""

    def interleaved(codes: np.ndarray) -> np.ndarray:
        packed = np.zeros((len(codes), codes.shape[1] // 8), np.uint64)
        for word in range(packed.shape[1]):
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, word] |= codes[:, 8 * word + column].astype(np.uint64) << np.uint64(4 * place)
        return packed.astype(np.uint32).view(np.int32)

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        groups = np.arange(weight.shape[1]) // size
        codes, zeros, scales = _grouped(weight, groups, 4)
        values = (codes - zeros[groups]) * scales[groups].astype(np.float64)
        stored = {".qweight": interleaved(codes), ".qzeros": interleaved(zeros), ".scales": scales}
        return stored, values.T.astype(np.float32)

    return pack


def compressed(bits: int, size: int, *, shuffled: bool = False) -> Pack:
    """Returns how compressed-tensors packs a weight with zero points; both codes have an offset, which cancels."""

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        groups = np.arange(weight.shape[1]) // size
        if shuffled:
            groups = np.random.default_rng(len(groups)).permutation(groups)
        codes, zeros, scales = _grouped(weight, groups, bits)
        values = (codes - zeros[groups]) * scales[groups].astype(np.float64)
        stored = {
            ".weight_packed": words(codes, bits).T,
            ".weight_zero_point": words(zeros.T, bits),
            ".weight_scale": scales.T,
            ".weight_shape": np.array(weight.shape),
        }
        stored |= {".weight_g_idx": groups.astype(np.int32)} if shuffled else {}
        return stored, values.T.astype(np.float32)

    return pack


def fp8(block: tuple[int, int] | None, scale_type: Any = np.float32) -> Pack:
    """Returns how DeepSeek stores a weight: E4M3 values and a factor for each block."""

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        height, width = block or weight.shape
        shape = (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
        scales, stored = np.zeros(shape, scale_type), np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
        values = np.zeros(weight.shape, np.float32)
        for i, j in np.ndindex(shape):
            at = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = np.abs(weight[at]).max() / 448
            stored[at] = weight[at] / np.float32(scales[i, j])
            values[at] = stored[at].astype(np.float32) * np.float32(scales[i, j])
        return {".weight": stored, ".weight_scale_inv": scales if block else scales.reshape(())}, values

    return pack


def bnb4(kind: str = "nf4", *, nested: bool = False, dtype: str = "bfloat16", size: int = 64) -> Pack:
    """Returns how bitsandbytes stores a weight in 4 bits."""
    levels = NF4 if kind == "nf4" else np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4] * 2, np.float32)
    if kind == "fp4":
        levels[8:] *= -1

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        flat = weight.reshape(-1)
        absmax = np.array([np.abs(flat[i : i + size]).max() for i in range(0, flat.size, size)], np.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": list(weight.shape)}
        stored = {".weight.absmax": absmax, ".weight.quant_map": levels}
        if nested:
            own = np.linspace(-1, 1, 256, dtype=np.float32)
            offset = float(absmax.mean())
            outer = np.abs(absmax - offset).max(keepdims=True).astype(np.float32)
            codes = np.abs(((absmax - offset) / outer)[:, None] - own).argmin(1).astype(np.uint8)
            stored[".weight.absmax"] = codes
            stored |= {".weight.nested_absmax": outer, ".weight.nested_quant_map": own}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = own[codes] * outer + np.float32(offset)
        codes = [int(np.abs(value / absmax[i // size] - levels).argmin()) for i, value in enumerate(flat)]
        stored[".weight"] = np.array([[a << 4 | b] for a, b in zip(codes[::2], codes[1::2], strict=True)], np.uint8)
        stored[f".weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        values = np.array([levels[code] * absmax[i // size] for i, code in enumerate(codes)], np.float32)
        rounded = values.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
        return stored, rounded.reshape(weight.shape)

    return pack


def bnb8() -> Pack:
    """Returns how bitsandbytes stores a weight in 8 bits."""

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        scales = np.abs(weight).max(1).astype(np.float32)
        codes = np.round(weight * (127 / scales)[:, None]).astype(np.int8)
        values = codes.astype(np.float32) * scales[:, None] * np.float32(7.874015718698502e-3)
        return {".weight": codes, ".SCB": scales, ".weight_format": np.array(0, np.uint8)}, values

    return pack


def mxfp4() -> Pack:
    """Returns how gpt-oss stores a weight [experts, in, out] in blocks of 32 inputs."""
    magnitudes = np.array(E2M1, np.float32)

    def pack(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        experts, rows, columns = weight.shape
        blocks = np.zeros((experts, columns, rows // 32, 16), np.uint8)
        scales = np.zeros((experts, columns, rows // 32), np.uint8)
        values = np.zeros_like(weight, np.float32)
        for e, column, b in np.ndindex(scales.shape):
            block = weight[e, 32 * b : 32 * b + 32, column]
            exponent = int(np.floor(np.log2(np.abs(block).max()))) - 2
            scales[e, column, b] = exponent + 127
            scaled = block / np.float32(2.0**exponent)
            codes = np.abs(np.abs(scaled)[:, None] - magnitudes).argmin(1)
            values[e, 32 * b : 32 * b + 32, column] = np.sign(scaled) * magnitudes[codes] * np.float32(2.0**exponent)
            nibbles = codes + 8 * (scaled < 0)
            blocks[e, column, b] = nibbles[::2] | nibbles[1::2] << 4
        return {"_blocks": blocks, "_scales": scales}, values

    return pack


def write_quantized(
    directory: Path, pack: Pack, quantization: dict[str, Any], family: str = "llama", **overrides: Any
) -> tuple[Path, Path]:
    """Writes a tiny model with the projections of its layers, or its experts, quantized.

    Args:
      directory: where to write both.
      pack: how a weight is stored.
      quantization: the `quantization_config`.
      family: as for `write_tiny_checkpoint`.
      **overrides: likewise.

    Returns:
      The directory of the quantized checkpoint, and that of the plain one with the same weights.
    """
    packed, dense = directory / "packed", directory / "dense"
    write_tiny_checkpoint(packed, family, **overrides)
    shutil.copytree(packed, dense)
    tensors = safetensors.numpy.load_file(packed / "model.safetensors")
    stored, plain = dict(tensors), dict(tensors)
    experts = quantization.get("quant_method") == "mxfp4"
    for name, tensor in tensors.items():
        if name.endswith("_proj") if experts else "_proj.weight" in name:
            parts, plain[name] = pack(tensor)
            del stored[name]
            stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()}
    save(stored, packed)
    save(plain, dense)
    change_config(packed, quantization_config=quantization)
    return packed, dense


def save(tensors: Tensors, directory: Path) -> None:
    """Writes `model.safetensors`."""
    tensors = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> Tensors:
    """Reads `model.safetensors`, without 8-bit floats, which safetensors does not read with numpy."""
    return safetensors.numpy.load_file(directory / "model.safetensors")


def change_config(directory: Path, **fields: Any) -> None:
    """Changes fields of `config.json`."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
