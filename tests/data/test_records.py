"""Records in memory: every kind of source gives the same dicts, and what is no source is refused with the way."""

from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from spt_jax.data import records
from spt_jax.data.records import gather_records
from spt_jax.errors import DataError

ROWS = [{"text": "good day", "stars": 1}, {"text": "bad day", "stars": 2}, {"text": "fine", "stars": 3}]


def stream():
    yield from ROWS


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        tuple(ROWS),
        pandas.DataFrame(ROWS),
        pyarrow.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        np.asarray(ROWS, object),
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_source_gives_the_same_records(source):
    assert gather_records(source, "train") == ROWS
    assert gather_records(source, "train", limit=100) == ROWS


def test_files_are_read_as_by_the_command_line(tmp_path: Path):
    pandas.DataFrame(ROWS).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    assert gather_records(tmp_path / "rows.jsonl", "train") == gather_records(str(tmp_path / "rows.jsonl"), "") == ROWS
    with pytest.raises(DataError, match=r"row\.jsonl: no such file; did you mean 'rows\.jsonl'\?"):
        gather_records(tmp_path / "row.jsonl", "train")


def test_only_streams_are_limited(monkeypatch: pytest.MonkeyPatch):
    assert gather_records(stream(), "train", limit=2) == ROWS[:2]
    assert gather_records(ROWS, "train", limit=2) == ROWS
    assert gather_records(datasets.Dataset.from_list(ROWS), "train", limit=2) == ROWS
    monkeypatch.setattr(records, "MAX_STREAMED", 2)
    with pytest.raises(DataError, match=r"validation: the stream has more than 2 records; end it, as by \.take\(n\)"):
        gather_records(stream(), "validation")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["good", "bad"], r"train: record 1 is str \('good'\); expected a mapping from field names to values"),
        ([ROWS[0], ("bad", 2)], "train: record 2 is tuple"),
        (pandas.Series(["good"]), "train: record 1 is str"),
        ({"text": ["good"], "stars": [1]}, "train: a mapping with the keys 'text', 'stars'; give a list of records"),
        (ROWS[0], "train: a mapping with the keys 'text', 'stars'"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS)), "dictionary of data sets; give one of them: 'a'"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "train: two columns are named 'a'"),
        (pandas.DataFrame([[1, 2]]), "train: record 1 has the field 0; names of fields must be text"),
        ([], "train: no records"),
        (iter([]), "train: no records"),
        (b"text", "train: bytes is not a source of records"),
    ],
)
def test_what_is_no_source_is_refused(source, message: str):
    with pytest.raises(DataError, match=message):
        gather_records(source, "train")
