"""No text has fewer tokens than its bytes say, whatever the tokenizer makes of it."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from spt_jax.data.tokenization import Tokenization
from spt_jax.serving.lengths import TextBound, text_bound
from spt_jax.testing import tiny_tokenizer

ALPHABET = (
    "a",
    "question ",
    "  ",
    "\u212a",
    "e\u0301",
    "\u03b1\u0313\u0300\u0345",
    "\U0001f600",
    "\n",
    "7",
    "word",
    "\u2581",
)


def changed(kind: str, change) -> object:
    tokenizer = tiny_tokenizer(kind)
    change(tokenizer.backend_tokenizer)
    return tokenizer


def normalized(*more):
    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([*more, *([backend.normalizer] if backend.normalizer else [])])

    return change


def split(splitter):
    def change(backend: Tokenizer) -> None:
        own = [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, *own])

    return change


FOLD = normalizers.Sequence([normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")])
KNOWN = {
    "byte": ("byte", lambda _: None),
    "sentencepiece": ("sentencepiece", lambda _: None),
    "NFC": ("byte", normalized(normalizers.NFC())),
    "folded spaces": ("sentencepiece", normalized(FOLD)),
    "digits": ("byte", split(pre_tokenizers.Digits(individual_digits=True))),
    "kept splits": ("byte", split(pre_tokenizers.Split(" ", "merged_with_previous"))),
    "added": ("byte", lambda backend: backend.add_tokens([AddedToken("question question question")])),
}
UNKNOWN = {
    "lower case": ("byte", normalized(normalizers.Lowercase())),
    "accents": ("byte", normalized(normalizers.StripAccents())),
    "spaces at the ends": ("byte", normalized(normalizers.Strip())),
    "removed letters": ("byte", normalized(normalizers.Replace(Regex("a+"), ""))),
    "shortened": ("byte", normalized(normalizers.Replace("question", "q"))),
    "removed splits": ("byte", split(pre_tokenizers.Split(" ", "removed"))),
    "words": ("byte", split(pre_tokenizers.WhitespaceSplit())),
    "added with spaces": ("byte", lambda backend: backend.add_tokens([AddedToken("word", lstrip=True)])),
    "unknown bytes": ("byte", lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Digits())),
    "word pieces": ("byte", lambda backend: setattr(backend, "model", models.WordPiece({"[UNK]": 0}))),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_text_has_at_least_the_tokens_of_its_bytes(name):
    tokenizer = changed(*KNOWN[name])
    bound, own, dice = text_bound(tokenizer), Tokenization(tokenizer), random.Random(0)
    assert bound is not None and bound.longest < 100
    texts = [part * 30 for part in ALPHABET]
    texts += ["".join(dice.choices(ALPHABET, k=dice.randrange(20))) for _ in range(300)]
    for text in texts:
        assert bound.bytes(text) <= bound.longest * len(own.opening(text)), text


@pytest.mark.parametrize("name", UNKNOWN)
def test_there_is_no_bound_where_text_may_vanish(name):
    assert text_bound(changed(*UNKNOWN[name])) is None


def test_bounds_of_real_vocabularies(shared):
    from transformers import AutoTokenizer

    from spt_jax.bases.base import STARTER

    folders = [STARTER, *(shared / "models" / "tokenizers" / name for name in ("gpt2", "llama2"))]
    found = [
        text_bound(AutoTokenizer.from_pretrained(folder)) for folder in [*folders, shared / "models" / "stories260K"]
    ]
    assert found == [TextBound(13, False), TextBound(128, False), TextBound(48, False), TextBound(9, True)]


@pytest.mark.parametrize("length", [10, 5_000, 50_000])
def test_long_texts_have_the_ids_of_short_ones(length):
    """Of a tokenizer that splits at words, whatever the call that encodes them."""
    own = Tokenization(tiny_tokenizer("byte"))
    assert own.opening("a question\n" * length) == own.opening("a question\n") * length
