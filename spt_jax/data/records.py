"""Records in memory: lists of mappings, data frames, data sets and streams of the `datasets` library, and files.

The other libraries are recognized by the methods that their objects have; none of them is imported.
"""

import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice
from typing import Protocol, TypeAlias, runtime_checkable

from spt_jax.data.sources import Record, read_records
from spt_jax.errors import DataError

MAX_STREAMED = 1_000_000  # most records of a stream whose length nothing limits


@runtime_checkable
class ArrowTable(Protocol):
    """A table of PyArrow."""

    def to_pylist(self) -> Sequence[Mapping[object, object]]: ...


# Rows are mappings from field names to values. A string or a path is a file or a hub data set, as in `read_records`.
RecordSource: TypeAlias = str | os.PathLike[str] | Iterable[object] | ArrowTable


@runtime_checkable
class _Frame(Protocol):
    """A data frame of pandas."""

    @property
    def columns(self) -> Iterable[object]: ...

    def to_dict(self, orient: str) -> Sequence[Mapping[object, object]]: ...


@runtime_checkable
class _PolarsFrame(Protocol):
    """A data frame of Polars."""

    def to_dicts(self) -> Sequence[Mapping[object, object]]: ...


def gather_records(
    source: RecordSource, name: str, *, limit: int | None = None, may_be_empty: bool = False
) -> list[Record]:
    """Returns the records of a source as a list of dicts.

    A stream (an `IterableDataset`, a generator) is read once, up to `limit` records.

    Args:
      source: a list of mappings; a data frame of pandas or Polars, or a table of PyArrow; a `datasets.Dataset` or
        `IterableDataset`; any other iterable of mappings; or a file or hub data set, as for `read_records`.
      name: the name of the source in error messages.
      limit: the maximum number of records to read from a stream; None to read it to its end.
      may_be_empty: whether there may be no records.

    Raises:
      DataError: the source is of another type, a record is not a mapping of field names to values, there are no
        records, or a stream without a limit does not end.
    """
    if isinstance(source, str | os.PathLike):
        return read_records(os.fspath(source))
    rows = rows_of(source, name)
    if not isinstance(rows, Sized):
        rows = list(islice(rows, limit if limit is not None else MAX_STREAMED + 1))
        if limit is None and len(rows) > MAX_STREAMED:
            raise DataError(f"{name}: the stream has more than {MAX_STREAMED:,} records; end it, as by .take(n)")
    records = [_record(row, name, number) for number, row in enumerate(rows, 1)]
    if not (records or may_be_empty):
        raise DataError(f"{name}: no records")
    return records


def rows_of(source: object, name: str) -> Iterable[object]:
    """Returns the rows of a source in memory. See `gather_records`.

    Raises:
      DataError: the source is of another type.
    """
    if isinstance(source, Mapping):
        if source and all(hasattr(part, "column_names") for part in source.values()):  # a DatasetDict
            raise DataError(f"{name}: a dictionary of data sets; give one of them: {', '.join(map(repr, source))}")
        raise DataError(
            f"{name}: a mapping with the keys {', '.join(map(repr, list(source)[:5])) or 'none'};"
            " give a list of records, each a mapping from field names to values"
        )
    if isinstance(source, _Frame):
        repeated = _repeated(list(source.columns))
        if repeated is not None:
            raise DataError(f"{name}: two columns are named {repeated!r}; give each a different name")
        return source.to_dict("records")
    if isinstance(source, _PolarsFrame):
        return source.to_dicts()
    if isinstance(source, ArrowTable):
        return source.to_pylist()
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return source
    raise DataError(
        f"{name}: {type(source).__name__} is not a source of records; give a list of mappings, a data frame, a data set"
        " of the datasets library, or the name of a file"
    )


def _repeated(names: Sequence[object]) -> object | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _record(row: object, name: str, number: int) -> Record:
    if not isinstance(row, Mapping):
        shown = f"{row!r:.60}"
        raise DataError(
            f"{name}: record {number} is {type(row).__name__} ({shown}); expected a mapping from field names to values"
        )
    for key in row:
        if not isinstance(key, str):
            raise DataError(f"{name}: record {number} has the field {key!r}; names of fields must be text")
    return dict(row)
