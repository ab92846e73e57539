"""Reads files of prompts from untrusted sources: limited in size, and checked before any array is created."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float

from spt_jax.errors import CheckpointError
from spt_jax.runtime.files import nearest_path

MAX_JSON_BYTES = 8 << 20
MAX_JSON_DEPTH = 32
MAX_HEADER_BYTES = 1 << 20
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

# Files in the prompt directories of PEFT and of this library.
_PARTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "prompt.json", "prompt.safetensors")
_NEEDED = "; a .npy file of one float array [P, D] is needed, as numpy.save(path, rows) writes it"


def check_directory(path: Path) -> None:
    """Refuses a file where its directory is expected. A missing path is accepted.

    Raises:
      CheckpointError: `path` is a file, or cannot be accessed.
    """
    try:
        if not path.exists() or path.is_dir():
            return
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{reprlib.repr(str(path))}: cannot be read ({error.strerror})") from error
    raise CheckpointError(f"{path}: is a file; give the directory {path.parent}")


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Refuses paths that are not regular files, such as pipes, and files that are too large.

    Raises:
      CheckpointError: `path` is not a regular file, or has more than `max_bytes`.
    """
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: {'not a regular file' if path.exists() else f'missing{nearest_path(path)}'}"
            )
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if max_bytes is not None and size > max_bytes:
        raise CheckpointError(f"{path}: {size:,} bytes; at most {max_bytes:,} are read")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Raises:
      CheckpointError: it is missing, larger than `MAX_JSON_BYTES`, not strict JSON, nested too deeply, not an object,
        or contains invalid Unicode.
    """
    check_file(path, MAX_JSON_BYTES)
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=partial(_refuse_constant, path),
        )
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read (nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {reprlib.repr(value)}, not a JSON object")
    if _depth(value) > MAX_JSON_DEPTH:
        raise CheckpointError(f"{path}: cannot be read (nested too deeply)")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: cannot be read (half of a surrogate pair is not a character)") from error
    return value


def _refuse_constant(path: Path, name: str) -> Any:
    raise CheckpointError(f"{path}: cannot be read ({name} is not a JSON value)")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name[:100]!r} occurs twice")
        result[name] = value
    return result


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def tensor_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the dtype and shape of every tensor of a safetensors file, from its header only.

    Raises:
      CheckpointError: it is missing, truncated or damaged, or its header is larger than `MAX_HEADER_BYTES`.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if MAX_HEADER_BYTES < header_bytes <= path.stat().st_size:
            raise CheckpointError(f"{path}: a header of {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
        with safetensors.safe_open(path, framework="numpy") as tensors:
            names: list[str] = list(tensors.keys())
            slices = {name: tensors.get_slice(name) for name in names}
            return {
                name: (_DTYPES.get(found.get_dtype(), str(found.get_dtype())), tuple(found.get_shape()))
                for name, found in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: missing, truncated or damaged ({str(error)[:300]})") from error


def check_tensors(
    where: str | Path,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    shapes: Mapping[str, tuple[int | None, ...]],
    dtypes: Sequence[str],
) -> None:
    """Compares the dtypes and shapes of tensors with expected ones; None in a shape stands for any size.

    Raises:
      CheckpointError: one is missing, unknown, of another dtype or shape, or empty.
    """
    for name in sorted(set(found) ^ set(shapes)):
        raise CheckpointError(f"{where}: the tensor {name[:200]!r} is {'unknown' if name in found else 'missing'}")
    for name, shape in shapes.items():
        dtype, sizes = found[name]
        fits = len(sizes) == len(shape) and all(b in (None, a) for a, b in zip(sizes, shape, strict=True))
        if not fits or dtype not in dtypes:
            raise CheckpointError(
                f"{where}: {name!r} is {dtype} {sizes}; it must be {' or '.join(dtypes)} {_written(shape)}"
            )
        if 0 in sizes:
            raise CheckpointError(f"{where}: {name!r} of shape {sizes} is empty")


def _written(shape: tuple[int | None, ...]) -> str:
    return str(tuple(shape)).replace("None", "any")


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Float[np.ndarray, "..."]]:
    """Reads named tensors as float32. Call `check_tensors` first.

    Raises:
      CheckpointError: they cannot be read, or are not finite.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: missing, truncated or damaged ({str(error)[:300]})") from error
    for name, array in arrays.items():
        check_finite(array, f"{path}: {name!r}")
    return arrays


def check_finite(array: np.ndarray, where: str) -> None:
    """Raises CheckpointError if an array holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise CheckpointError(f"{where} holds values that are not finite")


def read_npy(path: Path) -> np.ndarray:
    """Returns the memory-mapped array of a `.npy` file. Pickles are never loaded.

    Raises:
      CheckpointError: the file is not such an array; the message tells what it is.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory{_NEEDED}")
    if path.name in _PARTS and path.is_file():
        raise CheckpointError(f"{path}: is part of a prompt directory; give the directory {path.parent}")
    check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(256)
        if not start.startswith(b"\x93NUMPY"):
            raise CheckpointError(f"{path}: is {_kind(start)}{_NEEDED}")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except CheckpointError:
        raise
    except Exception as error:  # numpy raises exceptions of many types for invalid headers
        raise CheckpointError(f"{path}: no readable .npy array ({str(error)[:300]}){_NEEDED}") from error


def _kind(start: bytes) -> str:
    """Returns the kind of a file from its first bytes. In a zip archive, the name of the first member is at byte 30."""
    if start.startswith(b"PK\x03\x04"):
        member = start[30 : 30 + int.from_bytes(start[26:28], "little")]
        if member.endswith(b".npy"):
            return f"a .npz archive (its first array is {member.decode('utf-8', 'replace')!r})"
        return "a torch file (.pt), whose pickle is not read" if b"/" in member else "a zip archive"
    if start.startswith(b"\x80") and start[1:2] <= b"\x05":
        return "a pickle, such as an old torch file, which is not read because it can run code"
    if start[8:9] == b"{":
        return "a safetensors file"
    return "not a .npy file" if start else "empty"
