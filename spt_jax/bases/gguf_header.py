"""Reads the header and the tensors of a GGUF file.

The file is untrusted: every count, length and offset is checked against its size before anything is read or allocated.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spt_jax.errors import CheckpointError
from spt_jax.runtime.extras import load_extra

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# Type numbers of metadata values and their formats; 8 is a string and 9 an array.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# Public files have at most a few thousand of each, and vocabularies of 262,144 tokens.
_MOST_ENTRIES, _MOST_ITEMS, _MOST_CHARACTERS = 1 << 16, 1 << 22, 1 << 22
# Values and bytes of a block, by the number of the tensor type. K-quants have blocks of 256 values.
_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
      file: the file.
      kind: the name of its type, such as "Q4_K".
      shape: its shape, the innermost axis last.
      start: the offset of its first byte in the file.
      size: its length in bytes.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
      metadata: values by key, such as "general.architecture".
      tensors: tensors by name, in the order of the file.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_header(file: Path) -> GgufHeader:
    """Reads the metadata and the table of tensors.

    Args:
      file: the GGUF file.

    Returns:
      The header, whose tensors all lie within the file and do not overlap.

    Raises:
      CheckpointError: the file cannot be read, is truncated, or contradicts itself or the format.
    """
    try:
        with file.open("rb") as opened:
            if not opened.seek(0, 2):
                raise CheckpointError(f"{file}: empty file")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _header(_Reader(file, content))
    except OSError as error:
        raise CheckpointError(f"{file}: {error}") from error


class _Reader:
    """Reads values one after another and checks each against the end of the file."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file, self.content, self.at = file, content, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {what}; download the file again, or convert the model again")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.content) - self.at:
            raise self.fail(
                f"{what} of {size:,} bytes at byte {self.at:,} ends beyond the file's {len(self.content):,} bytes"
            )
        self.at += size
        return self.content[self.at - size : self.at]

    def scalar(self, kind: str, what: str) -> Scalar:
        form = struct.Struct(f"<{kind}")
        return form.unpack(self.take(form.size, what))[0]

    def number(self, kind: str, what: str) -> int:
        return int(self.scalar(kind, what))

    def count(self, most: int, what: str) -> int:
        found = self.number("Q", what)
        if found > most:
            raise self.fail(f"{what} is {found:,}; at most {most:,} are read")
        return found

    def string(self, what: str) -> str:
        length = self.count(_MOST_CHARACTERS, f"the length of {what}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({error})") from error

    def value(self, kind: int, what: str) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind in _FORMATS:
            return self.scalar(_FORMATS[kind], what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        item = self.number("I", f"the type of items of {what}")
        length = self.count(_MOST_ITEMS, f"the number of items of {what}")
        if item == _STRING:
            return [self.string(f"an item of {what}") for _ in range(length)]
        if item not in _FORMATS:
            raise self.fail(f"{what} is an array of the unknown or nested type {item}")
        form = _FORMATS[item]
        return list(struct.unpack(f"<{length}{form}", self.take(length * struct.calcsize(f"<{form}"), what)))


def _header(reader: _Reader) -> GgufHeader:
    if reader.take(4, "the magic number") != _MAGIC:
        raise CheckpointError(f"{reader.file}: not a GGUF file: it does not start with {_MAGIC.decode()}")
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        order = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(f"{reader.file}: GGUF version {version}{order} is not supported; 2 and 3 are")
    tensor_count = reader.count(_MOST_ENTRIES, "the number of tensors")
    metadata: dict[str, Value] = {}
    for _ in range(reader.count(_MOST_ENTRIES, "the number of metadata values")):
        key = reader.string("a metadata key")
        if key in metadata:
            raise reader.fail(f"the metadata key {key[:200]!r} is there twice")
        metadata[key] = reader.value(reader.number("I", f"the type of {key[:200]!r}"), f"{key[:200]!r}")
    table: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = reader.string("a tensor's name")
        if name in table:
            raise reader.fail(f"tensor {name[:200]!r} is there twice")
        dimensions = reader.number("I", f"the number of dimensions of {name[:200]!r}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise reader.fail(
                f"tensor {name[:200]!r} has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are possible"
            )
        shape = tuple(reader.number("Q", f"the shape of {name[:200]!r}") for _ in range(dimensions))[::-1]
        table[name] = (
            reader.number("I", f"the type of {name[:200]!r}"),
            shape,
            reader.number("Q", f"the offset of {name[:200]!r}"),
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise reader.fail(f"general.alignment is {alignment!r:.40}; it must be a power of two from 8")
    return GgufHeader(metadata, _tensors(reader, table, -(-reader.at // alignment) * alignment))


def _tensors(
    reader: _Reader, table: Mapping[str, tuple[int, tuple[int, ...], int]], data: int
) -> dict[str, GgufTensor]:
    """Returns the tensors with their places in the file, all checked."""
    tensors, size = {}, len(reader.content)
    for name, (number, shape, offset) in table.items():
        if number not in _BLOCKS:
            known = ", ".join(kind for kind, _, _ in _BLOCKS.values())
            raise CheckpointError(
                f"{reader.file}: tensor {name[:200]!r} has the type {number}, which is not supported; supported are"
                f" {known}"
            )
        kind, values, block = _BLOCKS[number]
        if shape[-1] % values:
            raise reader.fail(f"tensor {name[:200]!r} has rows of {shape[-1]:,} values; {kind} blocks have {values}")
        length = math.prod(shape) // values * block
        if not length or data + offset + length > size:
            raise reader.fail(
                f"tensor {name[:200]!r} of shape {shape} and type {kind} would end at byte {data + offset + length:,}"
                f" of {size:,}"
            )
        tensors[name] = GgufTensor(reader.file, kind, shape, data + offset, length)
    end, before = data, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise reader.fail(f"tensor {name[:200]!r} overlaps {before[:200]!r}")
        end, before = tensor.start + tensor.size, name
    return tensors


def read_bytes(tensor: GgufTensor) -> np.ndarray:
    """Returns a tensor as stored."""
    stored = np.fromfile(tensor.file, np.uint8, count=tensor.size, offset=tensor.start)
    if stored.size != tensor.size:
        raise CheckpointError(f"{tensor.file}: the file became shorter while it was read")
    return stored


def read_tensor(tensor: GgufTensor) -> np.ndarray:
    """Returns the values of a tensor: float16 or float32 as stored, float32 for all other types.

    Args:
      tensor: from the header of its file.
    """
    stored = read_bytes(tensor)
    if tensor.kind in ("F32", "F16"):
        return stored.view("<f4" if tensor.kind == "F32" else "<f2").reshape(tensor.shape)
    gguf = load_extra("gguf.quants", "reading GGUF files")
    rows = stored.reshape(*tensor.shape[:-1], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind]).reshape(tensor.shape)
