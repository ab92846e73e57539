"""Encodes the records of a run compactly, and keeps the result on disk for the next run of the same data."""

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.data.digests import is_ours, records_digest
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import CompactExamples
from spt_jax.runtime.disk_cache import cache_folder, cache_key, read_entry, write_entry

KIND = "examples"
# Fewer records are encoded faster than their files would be worth.
LEAST_RECORDS = 1000
_PACKAGES = ("tokenizers", "transformers", "jinja2", "numpy")


def encode_records(encoder: Encoder, records: Sequence[Mapping[str, Any]]) -> CompactExamples:
    """Returns the examples of `Encoder.encode_all`, of many records from the user's cache folder if they are there.

    What is kept depends on the records, the template, the tokenizer, and the versions of this package and of those that
    encode. Nothing is read or written for less than `LEAST_RECORDS` records, for a task that is not of this package, or
    if records hold something else than JSON values.

    Args:
      encoder: how records are encoded.
      records: the records.

    Raises:
      DataError: as in `Encoder.encode`.
    """
    kept = len(records) >= LEAST_RECORDS and is_ours(encoder.template) and cache_folder(KIND) is not None
    content = records_digest(records) if kept else None
    if content is None:
        return CompactExamples.of(encoder.encode_each(records))
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    key = cache_key([content, encoder.facts, versions])
    found = _read(key, len(records))
    if found is None:
        found = CompactExamples.of(encoder.encode_each(records))
        write_entry(KIND, key, _as_bytes(found))
    return found


def _as_bytes(examples: CompactExamples) -> bytes:
    """Returns a line of JSON with the digest and, for each array, its name, type and size, and then the arrays."""
    arrays = examples.arrays
    header = {"sha256": examples.digest, "arrays": [[n, own.dtype.str, own.size] for n, own in arrays.items()]}
    return b"".join([json.dumps(header).encode(), b"\n", *(own.tobytes() for own in arrays.values())])


def _read(key: str, count: int) -> CompactExamples | None:
    content = read_entry(KIND, key)
    if content is None:
        return None
    try:
        file = io.BytesIO(content)
        header = json.loads(file.readline())
        arrays, at = {}, file.tell()
        for name, kind, size in header["arrays"]:
            arrays[name] = np.frombuffer(content, kind, size, at)
            at += arrays[name].nbytes
        found = CompactExamples(arrays, header["sha256"])
    except (ValueError, TypeError, KeyError):
        return None
    return found if len(found) == count else None
