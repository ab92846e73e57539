"""Heads read the right tokens: whatever the tokenizer, the tokens up to a read spell the text up to there."""

import re

import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.testing import tiny_tokenizer

V = 100_000  # ids from here on are virtual
WORDS = ["Bob", "the", "Größte", "lives", "in", "(Paris)", "."]
TAGS = ["B-PER", "O", "I-PER", "O", "O", "B-LOC", "O"]
NAMES = {"O": "O", "B-PER": "P", "I-PER": "Q", "B-LOC": "L"}
PROMPTS = ["{words}", "<soft:2>{words}", "Tag: {words} end", "a<soft:1>b {words}<soft:1>"]
KINDS = ["byte", "sentencepiece", "gpt2", "llama2"]


def tokenizer_of(kind, request):
    if kind in ("byte", "sentencepiece"):
        return tiny_tokenizer(kind)
    import transformers

    return transformers.AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models/tokenizers" / kind)


def encoder_of(tokenizer, prompt, **options):
    count = sum(map(int, re.findall(r"soft:(\d)", prompt)))
    return Encoder(Template(prompt=prompt, virtual_tokens=count, **options), tokenizer, V, 500)


def spelled(tokenizer, ids) -> str:
    return tokenizer.decode([i for i in ids if i < V], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_tag_is_read_off_the_last_token_of_its_word(kind, prompt, request):
    tokenizer = tokenizer_of(kind, request)
    encoder = encoder_of(tokenizer, prompt, target="{tags}", head="tagging", reads="words", verbalizers=NAMES)
    example = encoder.encode({"words": WORDS, "tags": TAGS}, 0)
    assert [list(NAMES)[c] for c in example.classes] == TAGS
    for number, place in enumerate(example.reads, 1):
        text = spelled(tokenizer, example.ids[: place + 1])
        assert text.strip().endswith(" ".join(WORDS[:number])), text
        # A word is whole there: what follows begins another one.
        following = spelled(tokenizer, example.ids[: place + 2])
        assert WORDS[number - 1] in following
    again = encoder.encode({"words": " ".join(WORDS), "tags": " ".join(TAGS)}, 0)
    np.testing.assert_array_equal(again.reads, example.reads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["Größte", "Bob the", "(Paris) .", "lives", "Bob the Größte lives in (Paris) ."])
def test_a_span_is_the_answer_itself(kind, answer, request):
    tokenizer = tokenizer_of(kind, request)
    options = {"target": "{answer}", "head": "span", "reads": "text"}
    encoder = encoder_of(tokenizer, "Who? {q}\n<soft:2>In: {text}\nEnd", **options)
    text = " ".join(WORDS)
    record = {"q": "Where is Bob?", "text": text, "answer": answer}
    example = encoder.encode(record, 0)
    (start,), (end,) = (np.flatnonzero(example.classes & flag).tolist() for flag in (1, 2))
    assert encoder.read_text(record, start, end) == answer
    assert encoder.read_text(record, 0, len(example.reads) - 1) == text
    assert encoder.reference(record) == answer


def test_the_answer_that_squad_means(request):
    encoder = encoder_of(tiny_tokenizer(), "{q}\n{text}", target="{answers}", head="span", reads="text")
    text = "A cat is a cat."
    record = {"q": "?", "text": text, "answers": {"text": ["cat", "a cat"], "answer_start": [11, 9]}}
    example = encoder.encode(record, 0)
    (start,) = np.flatnonzero(example.classes & 1).tolist()
    assert encoder.read_text(record, 0, start).endswith("is a c")
    assert encoder.reference(record) == "cat"


BAD = [
    ({"words": WORDS, "tags": TAGS[:-1]}, "record 3: 7 words and 6 tags"),
    ({"words": [], "tags": []}, "0 words"),
    ({"words": ["a", ""], "tags": ["O", "O"]}, "makes no token of the word ''"),
    ({"words": ["a"], "tags": ["B-PERS"]}, "the tag 'B-PERS' is neither .*; did you mean 'B-PER'"),
    ({"words": ["a"]}, "no field 'tags'"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_tags(record, message):
    encoder = encoder_of(tiny_tokenizer(), "{words}", target="{tags}", head="tagging", reads="words", verbalizers=NAMES)
    with pytest.raises(DataError, match=message):
        encoder.encode(record, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("dog", "'dog' does not occur in the text"),
        ("", "there is no answer"),
        ({"text": [], "answer_start": []}, "there is no answer"),
        ({"text": ["cat"], "answer_start": [3]}, "does not occur"),
        ({"text": ["cat"]}, "does not occur"),
    ],
)
def test_bad_answers(answer, message):
    encoder = encoder_of(tiny_tokenizer(), "{text}", target="{answer}", head="span", reads="text")
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        encoder.encode({"text": "A cat is a cat.", "answer": answer}, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "tagging"}, "data.reads names"),
        ({"reads": "text"}, "data.reads names"),
        ({"head": "span", "reads": "txt"}, "data.reads='txt' is not a prompt field; did you mean 'text'"),
        ({"head": "span", "reads": "text", "target": "{a} {b}"}, "exactly one field"),
        ({"head": "span", "reads": "text", "truncate": "text"}, "data.truncate might cut off"),
    ],
)
def test_bad_templates(options, message):
    with pytest.raises(ConfigError, match=message):
        Template(**{"prompt": "{text}", "target": "{answer}", **options})
