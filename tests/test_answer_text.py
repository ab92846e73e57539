"""Where the rows of a generation end, and what the text of their ids is."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.tokenization import Tokenization
from spt_jax.inference.answers import Generated, continuation_text
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import VirtualPrompt
from spt_jax.testing import BOS_ID, EOS_ID, PAD_ID, tiny_tokenizer
from tests.examples import VIRTUAL, VOCAB
from tests.rigged import alphabet, count_steps, letter_ids, speaker, spoken, virtual_of


@pytest.fixture
def decoded_steps(monkeypatch):
    return count_steps(monkeypatch)


def test_eos(decoded_steps):
    """Rows end one by one, the last ends the loop; EOS is among the ids and no part of the text."""
    answers = spoken(alphabet(EOS_ID), "awpx")
    assert [answer.text for answer in answers] == ["bcdefghijklmnopqrstuvwx", "x", "qrstuvwx", ""]
    assert answers[2].ids == [*letter_ids("qrstuvwx"), EOS_ID]
    assert {answer.finished for answer in answers} == {"eos"}
    assert all(len(answer.log_probabilities) == len(answer.ids) for answer in answers)
    np.testing.assert_allclose(answers[0].log_probabilities, 0, atol=1e-4)
    assert decoded_steps == [24]


def test_length():
    answers = spoken(alphabet(EOS_ID), "att", max_new_tokens=4)[:2]
    assert [(answer.text, answer.finished) for answer in answers] == [("bcde", "length"), ("uvwx", "length")]
    answers = spoken(alphabet(EOS_ID), "axx", max_new_tokens=1)[:2]
    assert [(answer.text, answer.finished) for answer in answers] == [("b", "length"), ("", "eos")]


@pytest.mark.parametrize(
    ("stop", "new", "text", "said", "finished"),
    [
        (("ef",), 30, "bcd", "bcdef", "stop"),
        (("b",), 30, "", "b", "stop"),
        (("qr",), 30, "bcdefghijklmnop", "bcdefghijklmnopqr", "stop"),  # 16 tokens end with q, the first look
        (("pq",), 30, "bcdefghijklmno", "bcdefghijklmnopq", "stop"),
        (("uv", "st"), 30, "bcdefghijklmnopqr", "bcdefghijklmnopqrst", "stop"),
        (("de",), 5, "bc", "bcde", "stop"),
        (("ef",), 5, "bcd", "bcdef", "stop"),
        (("fg",), 5, "bcdef", "bcdef", "length"),
        (("cdefgh", "gh"), 30, "b", "bcdefgh", "stop"),  # both end with the same token; the text is cut at the first
        (("xz",), 30, "bcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwx$", "eos"),
    ],
    ids=str,
)
def test_stop_strings(stop, new, text, said, finished):
    (answer,) = spoken(alphabet(EOS_ID), "a", max_new_tokens=new, stop=stop)
    expected = [EOS_ID if letter == "$" else letter_ids(letter)[0] for letter in said]
    assert (answer.text, answer.ids, answer.finished) == (text, expected, finished)
    assert len(answer.log_probabilities) == len(answer.ids)


def test_every_declared_end_ends_a_row():
    """The base's files may declare several, and a chat has its own; a stop string is told from them."""
    base = alphabet(EOS_ID)
    m, p = letter_ids("mp")
    answers = spoken(dataclasses.replace(base, end_ids=(EOS_ID, m)), "anq", end_ids=(p,), stop=("<pad>",))
    assert [answer.text for answer in answers] == ["bcdefghijkl", "o", "rstuvwx"]
    assert [answer.ids[-1] for answer in answers] == [m, p, EOS_ID]
    assert {answer.finished for answer in answers} == {"eos"}


def test_a_batch_ends_when_every_row_has_met_a_stop_string(decoded_steps):
    answers = spoken(alphabet(), "ckk", max_new_tokens=32, stop=("mn",))
    assert [answer.text for answer in answers] == ["defghijkl", "l", "l"]
    assert decoded_steps == [16]
    decoded_steps.clear()
    answers = spoken(alphabet(), "cnk", max_new_tokens=32, stop=("mn",))
    assert [answer.text for answer in answers] == ["defghijkl", "opqrstuvwxabcdefghijkl", "l"]
    assert decoded_steps == [16, 32]


def test_a_control_token_may_be_a_stop_string(decoded_steps):
    """Its text never shows, so that it ends a row by its id."""
    (answer,) = spoken(alphabet(PAD_ID), "t", stop=("<pad>",))
    assert answer == Generated("uvwx", [*letter_ids("uvwx"), PAD_ID], answer.log_probabilities, "stop")
    assert decoded_steps == [5]


def test_prompts_with_any_ids_before():
    """What stands in front is read, and its text is no part of the answer's."""
    ids = letter_ids("abc")
    base = speaker({ids[0]: ids[1], ids[1]: ids[2]})
    prompts = [
        np.asarray([BOS_ID, *front, ids[0]]) for front in ([], [VOCAB], [70, VOCAB, 71, EOS_ID], [VOCAB, VOCAB + 1])
    ]
    answers = generate(base, prompts, virtual_of(base), SamplingConfig(max_new_tokens=2))
    assert [answer.text for answer in answers] == ["bc"] * 4


TEXTS = ["good question", " good question", "Hello", " the  two", "\nnew line ", "!", " , no", "é🙂", " 你好", "a"]


def tokenizer_of(name: str, request):
    if name in ("byte", "sentencepiece"):
        return tiny_tokenizer(name)
    import transformers

    return transformers.AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / name)


@pytest.mark.parametrize("name", ["byte", "sentencepiece", "tokenizers/gpt2", "tokenizers/llama2"])
def test_text_of_ids_is_what_was_encoded(name, request):
    """As the continuation of another text, and as the opening of one."""
    tokenizer = tokenizer_of(name, request)
    tokenization = Tokenization(tokenizer)
    for text in TEXTS:
        assert continuation_text(tokenizer, tokenization.continuation(text)) == text
        assert continuation_text(tokenizer, tokenization.opening(text), opens=True) == text


def test_control_tokens_are_no_text():
    tokenizer = tiny_tokenizer("sentencepiece")
    ids = [
        *Tokenization(tokenizer).continuation(" good"),
        EOS_ID,
        *Tokenization(tokenizer).continuation(" bad"),
        EOS_ID,
    ]
    assert continuation_text(tokenizer, ids) == " good bad"


def test_the_dummy_space_after_bos_and_after_a_virtual_token():
    """A SentencePiece-like tokenizer's space before the first word is text, unless the word opens the sequence."""
    tokenizer = tiny_tokenizer("sentencepiece")
    space, letter = word = tokenizer.convert_tokens_to_ids(["▁", "A"])
    base = dataclasses.replace(speaker({BOS_ID: space, space: letter}), tokenizer=tokenizer)
    virtual = VirtualPrompt(jnp.broadcast_to(base.params["embedding"][BOS_ID][None], (VIRTUAL, base.config.width)))
    (opening,) = generate(base, [np.asarray([BOS_ID])], virtual, SamplingConfig(max_new_tokens=2))
    (continuing,) = generate(base, [np.asarray([BOS_ID, VOCAB])], virtual, SamplingConfig(max_new_tokens=2))
    assert opening.ids == continuing.ids == word
    assert (opening.text, continuing.text) == ("A", " A")
