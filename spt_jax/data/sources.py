"""Files and hub data sets, read into records: plain dicts from field name to value."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError, DataError, did_you_mean

Record = dict[str, Any]


def read_records(
    source: str, *, split: str = "train", revision: str | None = None, limit: int | None = None
) -> list[Record]:
    """Reads a local file, by its ending, or a data set of the Hugging Face hub.

    CSV and TSV have a header row and their values stay strings; values of the other formats stay as they are stored
    (a hub data set's class labels are integers). Blank lines of JSONL and CSV are passed over.

    Args:
      source: a .jsonl, .json (a list of objects), .csv, .tsv or .parquet file, or a hub id such as "gsm8k" or
        "glue:sst2", with its configuration after the colon.
      split: which split of a hub data set. A file is one split already.
      revision: branch, tag or commit of a hub data set.
      limit: reads the first so many records; all when None.

    Raises:
      ConfigError: `limit` below 1, or a revision for a local file.
      DataError: the source is not there, is unreadable (with the line) or has no records.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1, or None for all records")
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one file in it ({did_you_mean('', _data_files(path))})")
    if not path.is_file() and not _looks_like_file(source):
        records = _hub_records(source, split, revision, limit)
    elif revision is not None:
        raise ConfigError(f"revision {revision!r} belongs to a hub data set, and {source} is a local file")
    else:
        records = list(islice(_file_records(path), limit))
    if not records:
        raise DataError(f"{source}: no records")
    return records


def check_fields(records: Iterable[Mapping[str, Any]], fields: Sequence[str], source: str) -> None:
    """Makes sure that every record has a value for each field that a template needs.

    Raises:
      DataError: a field is absent or null, with the source, the record's number (from 1) and the nearest known field.
    """
    for number, record in enumerate(records, 1):
        for field in fields:
            if field not in record:
                raise DataError(f"{source}: record {number} has no field {field!r}; {did_you_mean(field, record)}")
            if record[field] is None:
                raise DataError(f"{source}: field {field!r} of record {number} is null; fill it in or drop the record")


def _looks_like_file(source: str) -> bool:
    return source.lower().endswith(tuple(READERS)) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _data_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix.lower() in READERS]


def _file_records(path: Path) -> Iterator[Record]:
    if not path.exists():
        here = path.parent.is_dir()
        hint = did_you_mean(path.name, _data_files(path.parent)) if here else f"there is no folder {path.parent}"
        raise DataError(f"{path}: no such file; {hint}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; the endings read here are {', '.join(READERS)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {error.start} of the file); save it as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return record


def _checked_object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: an object with named fields is needed, not {json.dumps(value)[:40]}")
    return value


def _jsonl(path: Path) -> Iterator[Record]:
    # str.splitlines would also cut at the Unicode line separators that JSON strings may hold.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{where}: not JSON ({at})") from error
        yield _checked_object(value, where)


def _json(path: Path) -> Iterator[Record]:
    text = _read_text(path)
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line ends in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: a list of objects is needed, and this is {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _checked_object(value, f"{path}, record {number}")


def _csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not row:
                continue
            if not header:
                header = row
                if "" in header or len(set(header)) < len(header):
                    raise DataError(f"{where}: the header needs one distinct name a column, not {header}")
            elif len(row) != len(header):
                raise DataError(f"{where}: {len(row)} columns, and the header has {len(header)}")
            else:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}; a quote mark in a quoted value is written twice") from error


def _tsv(path: Path) -> Iterator[Record]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet ({error})") from error


def _hub_records(source: str, split: str, revision: str | None, limit: int | None) -> list[Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{source!r} is no file here, and the hub did not give its split {split!r} ({reason})"
        ) from error
    return rows.select(range(min(limit or len(rows), len(rows)))).to_list()


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
