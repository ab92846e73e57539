"""Files are written by other libraries or byte by byte, and read back."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from spt_jax.data.sources import check_fields, read_records
from spt_jax.errors import ConfigError, DataError

RECORDS = [
    {"text": 'He said "no", twice', "label": "a"},
    {"text": "two\nlines, é and \u2028", "label": "b"},
    {"text": "tab\there", "label": ""},
]
NESTED = [{"n": 1, "x": 0.5, "ok": True, "none": None, "turns": [{"role": "user", "content": "hi"}]}, {"n": 2}]


def write_csv(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(RECORDS)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".JSONL"])
@pytest.mark.parametrize("limit", [None, 1, 2, 99])
def test_reads_what_other_libraries_wrote(tmp_path, ending, limit):
    path = tmp_path / f"train{ending}"
    if ending in (".csv", ".tsv"):
        write_csv(path, "," if ending == ".csv" else "\t")
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif ending == ".json":
        path.write_text(json.dumps(RECORDS, indent=1))
    else:
        lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_records(str(path), limit=limit) == RECORDS[:limit]


def test_json_values_stay_and_csv_values_are_strings(tmp_path):
    for name, text in (("a.json", json.dumps(NESTED)), ("a.jsonl", "\n".join(map(json.dumps, NESTED)))):
        (tmp_path / name).write_text(text)
        assert read_records(str(tmp_path / name)) == NESTED
    (tmp_path / "a.csv").write_text("n,x\n007,1.50\n,true\n")
    assert read_records(str(tmp_path / "a.csv")) == [{"n": "007", "x": "1.50"}, {"n": "", "x": "true"}]


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\none,1\r\n\r\n"t\r\nwo",2\r\n')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    assert [record["text"] for record in read_records(str(tmp_path / "a.csv"))] == ["one", "t\r\nwo"]
    assert read_records(str(tmp_path / "a.jsonl")) == [{"text": "one"}, {"text": "two"}]


def test_columns_without_a_name_are_left_out(tmp_path):
    """As pandas writes its index, and Excel columns that were cleared."""
    (tmp_path / "a.csv").write_text(",text, ,label,\n0,one,,a,\n1,two,,b,\n")
    assert read_records(str(tmp_path / "a.csv")) == [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


@pytest.mark.parametrize("first", ["sep=;\r\n", "\ufeffsep=;\n", '"sep=;"\n'])
def test_a_file_may_name_its_separator(tmp_path, first):
    (tmp_path / "a.csv").write_text(first + 'text;label\n"one; two";a\n', newline="")
    assert read_records(str(tmp_path / "a.csv")) == [{"text": "one; two", "label": "a"}]


def test_long_values(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "x" * 300_000 + ",a\n")
    assert [len(record["text"]) for record in read_records(str(tmp_path / "a.csv"))] == [300_000]


def expanding(path, kind: str) -> None:
    """Small files of gigabytes: a long text in every row or often in one, empty rows, and one row of many numbers."""
    if kind in ("texts", "nested"):
        text = pyarrow.array(["x" * (1 << 20)])
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 6144, pyarrow.int32()), text)
        if kind == "nested":
            column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 6144], pyarrow.int32()), column)
    elif kind == "rows":
        column = pyarrow.nulls(25_000_000, pyarrow.int32())
    else:
        numbers = pyarrow.nulls(80_000_000, pyarrow.int32())
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(numbers)], pyarrow.int32()), numbers)
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)


@pytest.mark.parametrize("kind", ["texts", "nested", "rows", "numbers"])
def test_a_parquet_file_that_expands_too_far(tmp_path, kind):
    path = tmp_path / "a.parquet"
    expanding(path, kind)
    assert path.stat().st_size < 500_000
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=r"a\.parquet: expands to more than 512 MiB of records; split"):
        read_records(str(path))
    assert pyarrow.default_memory_pool().max_memory() - before < 600 << 20


BAD = {
    "a.jsonl": [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b'{"a": 1}\n\n{"a": 1,}\n', r"a\.jsonl, line 3: not JSON \(.* at column [89]\)"),
        (b'{"a": 1}\n{"a": "cut', r"line 2: not JSON \(Unterminated"),
        (b'{"a": 1}\n[1, 2]\n', r"line 2: expected an object .* not \[1, 2\]"),
        (b'{"a": 1}\n{"b": 1, "a": 1, "b": 2}\n', "line 2: .*field 'b' occurs twice"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not UTF-8 \(byte 16 of the file\)"),
        (b'\xef\xbb\xbf{"a": "\xff"}\n', r"line 1: not UTF-8 \(byte 10 of the file\)"),
        (b'{"a": ' * 200_000, r"line 1: not JSON \(nested too deeply\)"),
        (b'{"a": 1}\n' + b"[" * 900 + b"]" * 900, "line 2: expected an object .* not "),
        (b'{"a": "NaN"}\n{"a": NaN}\n', r"line 2: not JSON \(NaN is not a JSON value; write null .* column 7\)"),
        (b'{"a": [-Infinity]}\n', "line 1: not JSON .-Infinity is not"),
        (b'{"a": 1}\n{"a": 1, "b": "x\\ud83d y"}\n', "line 2, field 'b': half of a surrogate pair"),
        (b'{"b": [{"c": "\\uDC00"}]}\n', "line 1, field 'b': half of a surrogate pair"),
        (b'{"\\ud83d": 1}\n', "line 1, field .*: half of a surrogate pair"),
        (b'{"a": "\xed\xa0\xbd"}\n', "line 1: not UTF-8"),
    ],
    "a.json": [
        (b"[]", "no records"),
        (b'{"a": 1}', "expected a list of objects, not dict"),
        (b'[{"a": 1},\n {"a": }]', "line 2: not JSON .* column 8"),
        (b'{"a": 1}\n{"a": 2}\n', r"line 2: not JSON .*needs the suffix \.jsonl"),
        (b'[{"a": 1}, "b"]', "record 2: expected an object .* not 'b'"),
        (b'[{"a": 1, "a": 2}]', "field 'a' occurs twice"),
        (b'[{"a": "NaN"},\n {"a": NaN}]', "line 2: not JSON .NaN is not a JSON value; .* column 8"),
        (b'[{"a": 1}, {"a": "\\ud800"}]', "record 2, field 'a': half of a surrogate pair"),
        (b"[" * 200_000, "nested too deeply"),
    ],
    "a.csv": [
        (b"text,label\n", "no records"),
        (b'text,label\n"two\nlines",a\nmore,than,two\n', r"line 4: 3 columns, and the header has 2"),
        (b"text,label\none\n", "line 2: 1 columns"),
        (b'text,label\nfine,a\n"never closed,b\nmore,c\n', "line 3: unexpected end of data"),
        (b'text,label\nfine,a\n"in"side,b\n', "line 3: .*expected after"),
        (b"text,,text,\na,b,c,d\n", "line 1: the header names two columns 'text'"),
        (b",\na,b\n", "line 1: the header has no column names"),
        (b"text;label\na, b;c\n", "line 1: the columns are separated by ';' here; put a line 'sep=;'"),
        (b'"text";"label"\n"a";"b"\n', "line 1: the columns are separated by ';' here"),
        (b"text\tlabel\na\tb\n", r"line 1: the columns are separated by tabs here; .*\.tsv"),
        (b"sep=;\ntext;label\na;b;c\n", "line 3: 3 columns, and the header has 2"),
        (b"text,label\n\xff,a\n", r"line 2: not UTF-8 \(byte 11"),
    ],
    "a.tsv": [(b"text\tlabel\na\tb\tc\n", "line 2: 3 columns"), (b"text,label\n", r"by commas here; .*\.csv")],
    "a.parquet": [(b"", "the file is empty"), (b"PAR1 and no more", r"a\.parquet: not readable as parquet")],
    "a.txt": [(b"text", r"unknown file suffix '\.txt'.*\.jsonl, \.json, \.csv, \.tsv, \.parquet")],
    "a": [(b"text", "unknown file suffix ''")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
    ids=lambda value: str(value)[:40],
)
def test_bad_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_records(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_what_is_no_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean 'train\.jsonl'\?"):
        read_records(str(tmp_path / "trian.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl: no such file; .*empty contains no data files"):
        read_records(str(tmp_path / "empty" / "train.jsonl"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read_records(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(DataError, match=r"is a directory; .*train\.jsonl"):
        read_records(str(tmp_path))
    with pytest.raises(ConfigError, match="revision 'main' belongs to a hub data set"):
        read_records(str(tmp_path / "train.jsonl"), revision="main")
    with pytest.raises(ConfigError, match="limit is 0"):
        read_records(str(tmp_path / "train.jsonl"), limit=0)


def test_hub_data_sets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([] if kwargs["split"] == "none" else RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("glue:sst2", split="validation", revision="v1", limit=2) == RECORDS[:2]
    assert read_records("some/set") == RECORDS
    assert calls == [
        (("glue", "sst2"), {"split": "validation", "revision": "v1"}),
        (("some/set", None), {"split": "train", "revision": None}),
    ]
    with pytest.raises(DataError, match="some/set: no records"):
        read_records("some/set", split="none")


def test_hub_failure_says_why(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError(f"Unknown split {kwargs['split']!r}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'glue:sst2' is not a local file, .* \(ValueError: Unknown split 'dev'\)"):
        read_records("glue:sst2", split="dev")


def test_real_data(shared):
    assert len(read_records(str(shared / "data/trec/train.jsonl"))) == 4952
    assert len(read_records(str(shared / "data/sst2/test.jsonl"))) == 1821


def test_check_fields():
    check_fields(RECORDS, ["text", "label"], "train.csv")
    with pytest.raises(DataError, match=r"train\.csv: record 1 has no field 'txt'; did you mean 'text'\?"):
        check_fields(RECORDS, ["label", "txt"], "train.csv")
    with pytest.raises(DataError, match=r"train\.json: record 2 has no field 'x'; known: n"):
        check_fields(NESTED, ["n", "x"], "train.json")
    with pytest.raises(DataError, match="field 'none' of record 1 is null"):
        check_fields(NESTED[:1], ["none"], "train.json")
