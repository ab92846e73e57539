"""Reads files and Hugging Face data sets into records: plain dicts that map field names to values."""

import contextlib
import csv
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError, DataError, did_you_mean
from spt_jax.runtime.extras import check_installed, load_extra
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import check_path, local_copy, url_of

Record = dict[str, Any]

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')
# Separators that a CSV or TSV file may use instead, each with the end of the error message that names it.
_SEPARATORS = {
    ",": "commas here; let the file's name end in .csv",
    "\t": "tabs here; let the file's name end in .tsv",
    ";": "';' here; put a line 'sep=;' before the header, or save the file with commas",
    "|": "'|' here; put a line 'sep=|' before the header, or save the file with commas",
}
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?')
# Parquet files may expand by orders of magnitude: the limit is this size, or 100 times the file size if larger.
_MAX_EXPANDED_BYTES = 512 << 20
_MAX_EXPANSION = 100
_RECORD_BYTES, _VALUE_BYTES = 256, 8  # the size of a dict, and of a reference to a value
_BATCH_ROWS = 1024


@contextlib.contextmanager
def located(source: str | Path | None) -> Iterator[None]:
    """Adds the file or data set to errors about its records.

    Raises:
      DataError: the block raised one.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def read_records(
    source: str, *, split: str = "train", revision: str | None = None, limit: int | None = None
) -> list[Record]:
    """Reads a local or remote file, whose suffix determines the format, or a data set from the Hugging Face hub.

    CSV and TSV files have a header row, and their values are strings. In the other formats, values keep their stored
    types (class labels of hub data sets are integers). Blank lines in JSONL and CSV files are skipped, as are CSV
    columns without a name. A first line `sep=;`, as Excel writes it, sets the separator of a CSV file.

    Args:
      source: a .jsonl, .json (a list of objects), .csv, .tsv or .parquet file, a URL of one, or a hub id such as
        "gsm8k" or "glue:sst2", with the configuration after the colon.
      split: the split of a hub data set; ignored for files.
      revision: the branch, tag or commit of a hub data set.
      limit: the maximum number of records to read; None reads all.

    Returns:
      The records, as mappings from field names to values.

    Raises:
      ConfigError: `limit` is below 1, a revision was given for a local file, or the source is on the hub and `datasets`
        is not installed, or the package for the scheme of a URL.
      RemoteError: the file system of a URL cannot be reached, or has no such file.
      DataError: the source does not exist, cannot be parsed (the message names the line) or has no records.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1, or None for all records")
    path = local_copy(source).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one file in it ({did_you_mean('', _data_files(path))})")
    if _on_hub(source):
        records = _hub_records(source, split, revision, limit)
    elif revision is not None:
        raise ConfigError(f"revision {revision!r} belongs to a hub data set, and {source} is a local file")
    else:
        records = list(islice(_file_records(path), limit))
    if not records:
        raise DataError(f"{source}: no records")
    return records


def check_source(source: str) -> None:
    """Checks that a source can be read with the installed packages.

    Raises:
      ConfigError: it is a data set of the hub, and `datasets` is not installed, or a URL, and the package for its
        scheme is not; the message names the extra.
    """
    check_path(source)
    if _on_hub(source):
        check_installed("datasets", f"the hub data set {source!r}")


def check_fields(records: Iterable[Mapping[str, Any]], fields: Sequence[str], source: str) -> None:
    """Checks that every record has a value for each field that a template needs.

    Args:
      records: the records.
      fields: the names of the needed fields.
      source: the name of the source in error messages.

    Raises:
      DataError: a field is missing or null. The message names the record (from 1) and a similar field.
    """
    for number, record in enumerate(records, 1):
        for field in fields:
            if field not in record:
                raise DataError(f"{source}: record {number} has no field {field!r}; {did_you_mean(field, record)}")
            if record[field] is None:
                raise DataError(f"{source}: field {field!r} of record {number} is null; fill it in or drop the record")


def _on_hub(source: str) -> bool:
    return not url_of(source) and not Path(source).expanduser().exists() and not _looks_like_file(source)


def _looks_like_file(source: str) -> bool:
    return source.lower().endswith(tuple(READERS)) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _data_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix.lower() in READERS]


def _file_records(path: Path) -> Iterator[Record]:
    if not path.exists():
        if not path.parent.is_dir():
            hint = f"there is no folder {path.parent}{nearest_path(path)}"
        elif known := _data_files(path.parent):
            hint = did_you_mean(path.name, known)
        else:
            hint = f"{path.parent.absolute()} contains no data files"
        raise DataError(f"{path}: no such file; {hint}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown file suffix {path.suffix!r}; supported are {', '.join(READERS)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_text(path: str | Path) -> str:
    """Returns the text of a file, or of its URL, without a byte order mark.

    Args:
      path: the file or its URL.

    Raises:
      ConfigError: a package for the scheme of the URL is missing.
      DataError: the file is missing, cannot be read, is empty, or is not UTF-8.
      RemoteError: the file system of a URL cannot be reached, or has no such file.
    """
    file = local_copy(path)
    try:
        if not file.exists():
            raise DataError(f"{file}: no such file{nearest_path(file)}")
        return _read_text(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


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
        raise ValueError(f"the field {_repeated([name for name, _ in pairs])!r} occurs twice")
    return record


def _repeated(names: Iterable[str]) -> str | None:
    """Returns the first name that occurs a second time, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _parse_json(text: str) -> Any:
    """Parses strict JSON.

    Raises:
      ValueError: the text is not JSON, contains NaN or Infinity, has an object with a repeated field, or is nested too
        deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=partial(_refuse_constant, text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(text: str, name: str) -> Any:
    at = next(match.start() for match in _STRING_OR_CONSTANT.finditer(text) if match[0] == name)
    raise json.JSONDecodeError(f"{name} is not a JSON value; write null for a missing one:", text, at)


def _checked_object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with named fields, not {reprlib.repr(value)}")
    for name, part in value.items():
        if _has_lone_surrogate(name) or _has_lone_surrogate(part):
            raise DataError(f"{where}, field {name!r}: half of a surrogate pair is not a character")
    return value


def _has_lone_surrogate(value: Any) -> bool:
    """Whether a JSON value contains a lone surrogate, which UTF-8 cannot encode and no tokenizer accepts."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, str) and _LONE_SURROGATE.search(part):
            return True
    return False


def _jsonl(path: Path) -> Iterator[Record]:
    # str.splitlines would also split at the Unicode line separators that JSON strings may contain.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = _parse_json(line)
        except ValueError as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{where}: not JSON ({at})") from error
        yield _checked_object(value, where)


def _json(path: Path) -> Iterator[Record]:
    text = _read_text(path)
    try:
        values = _parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line needs the suffix .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of objects, not {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _checked_object(value, f"{path}, record {number}")


def _csv(path: Path, separator: str = ",") -> Iterator[Record]:
    text, skipped = _read_text(path), 0
    first, _, rest = text.partition("\n")
    if named := _SEPARATOR_LINE.fullmatch(first):
        separator, text, skipped = named[1], rest, 1
    csv.field_size_limit(2**31 - 1)  # process-wide: there is no limit per reader
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1 + skipped
    try:
        for row in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1 + skipped
            if not row:
                continue
            if not header:
                header = _checked_header(row, separator, where)
            elif len(row) != len(header):
                raise DataError(f"{where}: {len(row)} columns, and the header has {len(header)}")
            else:
                yield {name: value for name, value in zip(header, row, strict=True) if name}
    except csv.Error as error:
        if not header:
            _check_separator(text.partition("\n")[0], separator, f"{path}, line {line}")
        raise DataError(f"{path}, line {line}: {error}; in a quoted value, write each quotation mark twice") from error


def _checked_header(row: Sequence[str], separator: str, where: str) -> list[str]:
    """Returns the column names, "" for unnamed columns such as pandas' index or columns cleared in Excel."""
    if len(row) == 1:
        _check_separator(row[0], separator, where)
    names = [name if name.strip() else "" for name in row]
    named = [name for name in names if name]
    if not named:
        raise DataError(f"{where}: the header has no column names")
    if repeated := _repeated(named):
        raise DataError(f"{where}: the header names two columns {repeated!r}; give each a different name")
    return names


def _check_separator(header: str, separator: str, where: str) -> None:
    for other, advice in _SEPARATORS.items():
        if other in header and separator not in header:
            raise DataError(f"{where}: the columns are separated by {advice}")


def _tsv(path: Path) -> Iterator[Record]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    limit = max(_MAX_EXPANDED_BYTES, _MAX_EXPANSION * path.stat().st_size)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema, columns = file.schema_arrow, [file.schema.column(i) for i in range(len(file.schema))]
        # Texts stay dictionary-encoded, so a text that many rows share is stored once until its rows are counted.
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file, expanded = pyarrow.parquet.ParquetFile(path, read_dictionary=texts), 0
        for group in range(file.num_row_groups):
            declared = file.metadata.row_group(group)
            chunks = [declared.column(i) for i in range(declared.num_columns)]
            values = sum(chunk.total_uncompressed_size + chunk.num_values * _VALUE_BYTES for chunk in chunks)
            _check_expansion(expanded + values + declared.num_rows * _RECORD_BYTES, limit, path)
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                expanded += sum(map(_expanded_bytes, batch.columns)) + batch.num_rows * _RECORD_BYTES
                _check_expansion(expanded, limit, path)
                yield from pyarrow.Table.from_batches([batch]).cast(schema).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not readable as parquet ({error})") from error


def _expanded_bytes(array: Any) -> int:
    """Returns the bytes of an Arrow array's values; a dictionary's value counts once per reference to it."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # Its functions are created at import, so type checkers do not see them.
    kinds = pyarrow.types
    if kinds.is_dictionary(array.type):
        if not (kinds.is_string(array.type.value_type) or kinds.is_binary(array.type.value_type)):
            return len(array) * _VALUE_BYTES
        lengths = compute.binary_length(array.dictionary)
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if kinds.is_struct(array.type):
        return sum(map(_expanded_bytes, array.flatten()))
    if kinds.is_map(array.type):
        return _expanded_bytes(array.keys) + _expanded_bytes(array.items)
    if kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type):
        return len(array) * _VALUE_BYTES + _expanded_bytes(array.flatten())
    return array.nbytes


def _check_expansion(size: int, limit: int, path: Path) -> None:
    if size > limit:
        raise DataError(
            f"{path}: expands to more than {limit >> 20:,} MiB of records; split the file, or read only the first"
            " records (data.limit)"
        )


def _hub_records(source: str, split: str, revision: str | None, limit: int | None) -> list[Record]:
    datasets = load_extra("datasets", f"the hub data set {source!r}")
    name, _, config = source.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{source!r} is not a local file, and the hub did not return its split {split!r} ({reason})"
        ) from error
    return rows.select(range(min(limit or len(rows), len(rows)))).to_list()


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
