"""What of a record's field is text, and what is refused with its place."""

import datetime
import decimal
import json

import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.data.values import text_of
from spt_jax.errors import DataError
from spt_jax.testing import tiny_tokenizer

V = 1000


@pytest.mark.parametrize("written", ["true", "false", "0", "-3", "1.0", "0.25", "12345678901234567890"])
def test_numbers_and_booleans_are_written_as_in_json(written):
    assert text_of(json.loads(written), "x") == written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.bool_(True), "true"),
        (np.float64(1.0), "1.0"),
        (np.int64(3), "3"),
        (decimal.Decimal("1.10"), "1.10"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}], "a b"),
        ("", ""),
    ],
    ids=str,
)
def test_other_values_that_have_a_text(value, text):
    assert text_of(value, "x") == text


BAD = [
    (None, "is null"),
    (float("nan"), "is NaN"),
    (np.float32("nan"), "is NaN"),
    (decimal.Decimal("NaN"), "is NaN"),
    (float("inf"), r"is float \(inf\)"),
    ([], r"is a list \(\[\]\)"),
    (["a"], r"is a list \(\['a'\]\)"),
    ([{"type": "image", "text": "a"}], "is a list"),
    ([{"type": "text", "text": "a", "image": "b"}], "is a list"),
    ({"text": "a"}, r"is a mapping"),
    (b"a", r"is bytes"),
    (datetime.date(2020, 1, 1), r"is date \(2020-01-01\)"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=str)
@pytest.mark.parametrize("field", ["text", "label", "kind"])
def test_values_that_are_no_text_are_refused_with_record_and_field(field, value, message):
    """In a prompt, in a target, as a class and as a task's name."""
    options = {"verbalizers": {"a": "yes", "b": "no"}, "task": "kind", "tasks": ("x", "y")}
    encoder = Encoder(Template(prompt="{text}", target="{label}", **options), tiny_tokenizer(), V, 100)
    record = {"text": "one", "label": "a", "kind": "x"}
    with pytest.raises(DataError, match=f"record 2: the field '{field}' {message}"):
        encoder.encode_all([record, {**record, field: value}])
    free = Encoder(Template(prompt="{text}", target="{label}"), tiny_tokenizer(), V, 100)
    if field != "kind":
        with pytest.raises(DataError, match=f"record 5: the field '{field}' {message}"):
            free.encode({**record, field: value}, 4)
        with pytest.raises(DataError, match=f"the field '{field}' {message}"):
            free.reference({**record, field: value}) if field == "label" else free.prompt_ids({**record, field: value})


def test_labels_of_json_are_classes():
    """true and false are named as JSON writes them, and so are numbers."""
    template = Template(
        prompt="{text}", target="{label}", verbalizers={"true": "A", "false": "B", "3": "C", "0.5": "D"}
    )
    encoder = Encoder(template, tiny_tokenizer(), V, 100)
    records = [{"text": "a", "label": label} for label in json.loads("[false, true, 0.5, 3]")]
    assert [example.label for example in encoder.encode_all(records)] == [1, 0, 3, 2]


@pytest.mark.parametrize("words", [["a", None], ["a", ["b"]], ["a", float("nan")]])
def test_words_that_are_no_text(words):
    template = Template(
        prompt="{words}", target="{tags}", head="tagging", reads="words", verbalizers={"X": "X", "O": "O"}
    )
    encoder = Encoder(template, tiny_tokenizer(), V, 100)
    with pytest.raises(DataError, match=r"^record 1: the field 'words': word 2 is"):
        encoder.encode({"words": words, "tags": ["X", "O"]}, 0)
    with pytest.raises(DataError, match=r"^record 1: the field 'tags': word 2 is null"):
        encoder.encode({"words": ["a", "b"], "tags": ["X", None]}, 0)
