"""A table of trials, as CSV and Parquet."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.runtime.files import write_bytes


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one with dotted names; lists and empty mappings become JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, (Mapping, list, tuple)) else value
    return found


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `path`.csv and `path`.parquet, with a column for each name in any row, in order of first occurrence.

    The values of a column with more than one type are converted to strings.
    """
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _of_one_kind([row.get(name) for row in rows]) for name in names}
    table = pyarrow.table(columns)
    for ending, write in ((".csv", pyarrow.csv.write_csv), (".parquet", pyarrow.parquet.write_table)):
        buffer = io.BytesIO()
        write(table, buffer)
        write_bytes(path.with_name(path.name + ending), buffer.getvalue())


def _of_one_kind(values: Sequence[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return list(values)
