"""Examples in compact form are the same examples, and those on disk are those of the same data."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from spt_jax.data import encoded
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import CompactExamples, Example, digest
from spt_jax.data.templates import Template
from spt_jax.data.turns import around_chat
from spt_jax.errors import DataError
from spt_jax.runtime import disk_cache
from spt_jax.testing import tiny_tokenizer
from tests.data.test_batch_encoding import same

CLASSES = Template(prompt="Say {text}", target="{label}", verbalizers={"a": "yes it is", "b": "no"})
RECORDS = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(40)]


def encoder(template: Template = CLASSES, max_length: int = 100) -> Encoder:
    return Encoder(template, tiny_tokenizer(), 384, max_length)


def example(index: int, length: int, **parts) -> Example:
    ids = np.arange(length, dtype=np.int32) + index
    return Example(ids, ids % 2 == 0, **{"choices": (), "label": index % 3, "index": index, **parts})


def choices(*lengths: int) -> tuple[np.ndarray, ...]:
    return tuple(np.arange(length, dtype=np.int32) for length in lengths)


MIXED = [
    example(0, 3),
    example(5, 1, choices=choices(1, 2)),
    example(1, 4, reads=np.asarray([1, 3], np.int32), classes=np.asarray([0, 2], np.int32), prompt=2),
    example(2, 2, choices=choices(3)),
    example(7, 5, reads=np.zeros(0, np.int32), classes=np.zeros(0, np.int32)),
    example(3, 2, choices=choices(1, 2)),
]


def test_compact_examples_are_the_examples():
    compact = CompactExamples.of(iter(MIXED))
    assert len(compact) == len(MIXED) and all(map(same, compact, MIXED))
    assert [e.reads is None for e in compact] == [e.reads is None for e in MIXED]
    assert same(compact[-1], MIXED[-1]) and [e.index for e in compact[1:5:2]] == [5, 2]
    assert digest(compact) == digest(MIXED)
    assert all(map(same, CompactExamples.of(compact), MIXED))
    for beyond in (6, -7):
        with pytest.raises(IndexError, match="of 6"):
            compact[beyond]
    assert len(CompactExamples.of([])) == 0


def test_batches_of_compact_examples_are_the_same():
    plain = encoder().encode_all(RECORDS)
    compact = CompactExamples.of(plain)
    plans = [plan_batches(examples, lead=2, batch_size=8) for examples in (plain, compact)]
    rows = [vars(pack(own[:8], plan).rows) for own, plan in zip((compact, plain), plans, strict=True)]
    for ours, theirs in zip(*(own.values() for own in rows), strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)


def test_compact_examples_are_small():
    ids, predicted = np.arange(16, dtype=np.int32), np.zeros(16, bool)
    compact = CompactExamples.of(Example(ids, predicted, (), 0, number) for number in range(1000))
    assert sum(own.nbytes for own in compact.arrays.values()) < 1000 * (16 * 5 + 13 * 8 + 8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(disk_cache.CACHE, str(tmp_path))
    monkeypatch.setattr(encoded, "LEAST_RECORDS", 10)
    return tmp_path / encoded.KIND


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the records that were encoded and not read from the cache."""
    made: list[str] = []
    encode = Encoder.encode

    def counted(self: Encoder, record: dict[str, str], index: int) -> Example:
        made.append(record["text"])
        return encode(self, record, index)

    monkeypatch.setattr(Encoder, "encode", counted)
    return made


def test_records_are_encoded_once(cache: Path, calls: list[str]):
    first = encoded.encode_records(encoder(), RECORDS)
    assert len(calls) == len(RECORDS) and len(list(cache.iterdir())) == 1
    again = encoded.encode_records(encoder(), [dict(record) for record in RECORDS])
    assert len(calls) == len(RECORDS)
    assert all(map(same, again, first)) and again.digest == first.digest == digest(list(first))


OTHERS = [
    (encoder(), [*RECORDS[1:], RECORDS[0]]),
    (encoder(), [{**RECORDS[0], "text": "other"}, *RECORDS[1:]]),
    (encoder(dataclasses.replace(CLASSES, prompt="Tell {text}")), RECORDS),
    (encoder(dataclasses.replace(CLASSES, verbalizers=dict(reversed(CLASSES.verbalizers.items())))), RECORDS),
    (encoder(max_length=90), RECORDS),
    (Encoder(CLASSES, tiny_tokenizer(add_bos=False), 384, 100), RECORDS),
    (Encoder(CLASSES, tiny_tokenizer("sentencepiece"), 384, 100), RECORDS),
]


def test_what_examples_depend_on_is_their_key(cache: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch):
    encoded.encode_records(encoder(), RECORDS)
    for number, (own, records) in enumerate(OTHERS, 2):
        found = encoded.encode_records(own, records)
        assert len(calls) == number * len(RECORDS)
        assert all(map(same, found, own.encode_all(records)))
        del calls[number * len(RECORDS) :]
    monkeypatch.setattr(disk_cache, "code_digest", lambda: "of another version")
    encoded.encode_records(encoder(), RECORDS)
    assert len(calls) == (len(OTHERS) + 2) * len(RECORDS)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other content"])
def test_a_damaged_file_is_encoded_again(cache: Path, calls: list[str], damage: str):
    first = encoded.encode_records(encoder(), RECORDS)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    other = b'{"sha256": null, "arrays": [["ids", "<i4", 99]]}\n'
    file.write_bytes(
        {
            "cut": content[:-1],
            "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "empty": b"",
            "other content": hashlib.sha256(other).digest() + other,
        }[damage]
    )
    assert all(map(same, encoded.encode_records(encoder(), RECORDS), first))
    assert len(calls) == 2 * len(RECORDS) and file.read_bytes() == content


def test_what_is_not_kept(cache: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch):
    encoded.encode_records(encoder(), RECORDS[:9])  # too few
    encoded.encode_records(encoder(), [{**record, "image": object()} for record in RECORDS])
    with pytest.raises(DataError, match="record 40"):
        encoded.encode_records(encoder(), [*RECORDS[:-1], {"text": "a", "label": "c"}])
    monkeypatch.setenv(disk_cache.CACHE, disk_cache.OFF)
    encoded.encode_records(encoder(), RECORDS)
    assert not cache.exists()


def test_a_chat_keeps_its_bos_first():
    from spt_jax.data.templates import Bos, Control, Plain, Text

    template, chat = Template(prompt="Go {messages}"), [Control(1), Plain("hi")]
    assert around_chat(template, 1, chat) == [Control(1), Text("Go "), Plain("hi")]
    assert around_chat(template, None, chat) == [Text("Go "), *chat]
    assert around_chat(Template(prompt="<bos>{messages}"), 1, chat) == [Bos(), Plain("hi")]
