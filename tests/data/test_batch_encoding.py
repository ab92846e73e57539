"""Records are encoded in batches of the tokenizer, with the ids of one at a time."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from spt_jax.data.encoder import Encoder
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.data.tokenization import Tokenization
from spt_jax.errors import DataError
from spt_jax.testing import TokenizerKind, tiny_tokenizer

V = 384
WORDS = ["", "the answer", " is", "\u00e9\u4e2d", "a\nb", "</s>", "x" * 60, "\u2581 the"]
RECORDS = [{"text": text, "more": WORDS[-number - 1], "label": "a"} for number, text in enumerate(WORDS)]
TEMPLATES = {
    "text": Template(prompt="<soft>{text}\n{more}:", target="{text}", virtual_tokens=2),
    "bos": Template(prompt="<soft:1>{text}<bos>{more}<soft:2>", target="{more}", virtual_tokens=3),
    "classes": Template(prompt="Say {text}", target="{label}", verbalizers={"a": "yes", "b": "no"}),
    "pairs": Template(prompt="Say {text}", target="{more}", rejected="{text}", head="preference"),
    "tagging": Template(
        prompt="Say {text} now", target="{label}", reads="text", head="tagging", verbalizers={"a": "a"}
    ),
}


def same(one: Example, other: Example) -> bool:
    parts = [[getattr(e, f.name) for f in dataclasses.fields(e)] for e in (one, other)]
    return all(
        np.array_equal(np.concatenate(a), np.concatenate(b)) if isinstance(a, tuple) and a else np.array_equal(a, b)
        for a, b in zip(*parts, strict=True)
    )


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_batch_has_the_ids_of_single_records(kind: TokenizerKind, name: str):
    encoder = Encoder(TEMPLATES[name], tiny_tokenizer(kind), V, 500)
    records = [
        {**r, "text": f"{r['text']} one two", "label": ["a"] * len(f"{r['text']} one two".split())}
        if name == "tagging"
        else r
        for r in RECORDS
        if name != "pairs" or (r["text"] and r["more"] and r["text"] != r["more"])
    ]
    alone = [encoder.encode(record, number) for number, record in enumerate(records)]
    assert all(map(same, encoder.encode_all(records), alone))


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_the_tokenizer_is_called_once_for_a_batch(kind: TokenizerKind, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(TEMPLATES["text"], tiny_tokenizer(kind), V, 500)
    expected = encoder.encode_all(RECORDS)

    def refused(self: Tokenization, text: str) -> tokenizers.Encoding:
        ready = self._ready.get(text)
        assert ready is not None or text in ("", "\n", "a", "."), text  # the anchors, once per tokenizer
        return ready or self._tokenizer.encode(text, add_special_tokens=False)

    monkeypatch.setattr(Tokenization, "_encoding", refused)
    assert all(map(same, encoder.encode_all(RECORDS), expected))


def test_records_are_numbered_across_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spt_jax.data.encoder._TOGETHER", 3)
    encoder = Encoder(TEMPLATES["text"], tiny_tokenizer(), V, 500)
    assert [example.index for example in encoder.encode_all(RECORDS)] == list(range(len(RECORDS)))
    broken = [*RECORDS[:4], {"text": "a"}, *RECORDS[4:]]
    with pytest.raises(DataError, match=r"record 5.*more"):
        encoder.encode_all(broken)


@pytest.mark.parametrize(("text", "message"), [("\ud800", "surrogate"), (None, "record 2")])
def test_what_cannot_be_encoded_is_named_as_for_a_single_record(text: str | None, message: str):
    encoder = Encoder(TEMPLATES["text"], tiny_tokenizer(), V, 500)
    with pytest.raises(DataError, match=message):
        encoder.encode_all([RECORDS[1], {**RECORDS[1], "text": text}, RECORDS[2]])
    assert encoder.encode_all(RECORDS[:1])[0].length > 0  # nothing of the batch is left
