"""GGUF models in several files, as llama.cpp's gguf-split writes them: metadata in the first, tensors in all."""

import dataclasses
import re
from pathlib import Path

from spt_jax.bases.gguf_header import GgufHeader, read_header
from spt_jax.errors import CheckpointError

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 1000


def part_names(name: str) -> list[str]:
    """Returns the names of all files of a model, given that of one: itself alone if it is whole."""
    found = _NAME.fullmatch(name)
    if found is None or not 0 < int(found["count"]) <= _MOST_PARTS:
        return [name]
    count = int(found["count"])
    return [f"{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def read_model(file: Path) -> GgufHeader:
    """Reads the headers of a file and, if it is the first part of a model, of the other parts, which lie beside it.

    Args:
      file: the GGUF file, or the first part.

    Returns:
      The metadata of the first part, and the tensors of all.

    Raises:
      CheckpointError: a part is damaged or missing, is another one than its name says, or the parts do not belong
        together.
    """
    first = read_header(file)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return first
    names = part_names(file.name)
    if len(names) != count:
        raise CheckpointError(
            f"{file}: one of {count!r:.20} parts of a model, which are named NAME-00001-of-{count!s:.5}.gguf and so"
            " on; give the parts their names"
        )
    if file.name != names[0]:
        raise CheckpointError(f"{file}: not the first part of the model; name {names[0]}")
    tensors = {}
    for number, name in enumerate(names):
        part = file.with_name(name)
        if not part.is_file():
            raise CheckpointError(f"{part}: no such file; {file.name} is the first of {count} parts of a model")
        header = first if number == 0 else read_header(part)
        found = tuple(header.metadata.get(f"split.{key}") for key in ("no", "count"))
        if found != (number, count):
            raise CheckpointError(
                f"{part}: it says that it is part {found[0]!r:.20} (from 0) of {found[1]!r:.20}; its name says part"
                f" {number} of {count}"
            )
        if twice := sorted(tensors.keys() & header.tensors.keys()):
            raise CheckpointError(f"{part}: tensor {twice[0][:200]!r} is in an earlier part, too")
        tensors |= header.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(f"{file}: the model has {stated!r:.20} tensors, and the parts hold {len(tensors)}")
    return dataclasses.replace(first, tensors=tensors)
