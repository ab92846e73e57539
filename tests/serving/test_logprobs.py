"""Tokens of log-probabilities have their own bytes; prompts can be token ids, and come back with their scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.inference.answers import continuation_text
from spt_jax.inference.forward import run_lead
from spt_jax.serving.answers import Choice, chat_logprobs, completion_logprobs
from spt_jax.serving.tokens import token_name
from spt_jax.testing import tiny_tokenizer
from tests.layouts import row_logits
from tests.serving.conftest import PROMPTS

TEXT = "ab \U0001f600\u00e9 c"


def choice_of(kind: str, ids: list[int]) -> Choice:
    tokenizer = tiny_tokenizer(kind)
    own = Choice(
        lambda ids: continuation_text(tokenizer, ids), lambda id_: token_name(tokenizer, id_), (), ids, finished="stop"
    )
    own.log_probabilities = [-1.0 - i for i in range(len(ids))]
    own.alternatives = [{ids[0]: -99.0, id_: value} for id_, value in zip(ids, own.log_probabilities, strict=True)]
    own.text = own.text_of(ids)
    return own


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_tokens_have_their_own_bytes(kind):
    """Joined they are the text, whose characters of several bytes are of several tokens here."""
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    if kind == "sentencepiece":
        ids = ids[1:] if continuation_text(tokenizer, ids[:1]) == " " else ids
    choice = choice_of(kind, ids)
    chat = chat_logprobs(choice, 0).content
    joined = b"".join(bytes(token.bytes or []) for token in chat)
    assert joined.decode() == choice.text and TEXT in f" {choice.text}"
    assert [byte for token in chat if token.token.startswith("\\x") for byte in token.bytes][:4] == [240, 159, 152, 128]
    for token in chat:
        named = "".join(f"\\x{byte:02x}" for byte in token.bytes or [])
        assert token.token in (named, bytes(token.bytes or []).decode(errors="replace"))
        for other in token.top_logprobs:
            assert other.bytes and (other.logprob == token.logprob) == (other.token == token.token)
    old = completion_logprobs(choice)
    assert [name.removeprefix("bytes:") for name in old.tokens] == [token.token for token in chat]
    assert sum(name.startswith("bytes:\\x") for name in old.tokens) == 6
    ends = [*old.text_offset[1:], len(choice.text)]
    assert "".join(choice.text[a:b] for a, b in zip(old.text_offset, ends, strict=True)) == choice.text
    assert all(
        value == top[name] for value, name, top in zip(old.token_logprobs, old.tokens, old.top_logprobs, strict=True)
    )


def test_parts_of_a_character_that_stay_parts():
    """What follows them keeps its own bytes; a control token has none."""
    tokenizer = tiny_tokenizer("byte")
    first, *_ = tokenizer.encode("\u00e9", add_special_tokens=False)
    letter, own = (tokenizer.encode(text, add_special_tokens=False)[0] for text in ("c", "\ufffd"))
    chat = chat_logprobs(choice_of("byte", [first, letter, tokenizer.eos_token_id]), 0).content
    assert [(token.token, token.bytes) for token in chat] == [("\\xc3", [0xC3]), ("c", [99]), ("", [])]
    assert token_name(tokenizer, tokenizer.eos_token_id).bytes is None
    assert token_name(tokenizer, own).is_partial and token_name(tokenizer, 10**6).text == "<1000000>"


def scores_of(server, name: str, ids: list[int]):
    """Log-probabilities of every id after those before it, by the forward pass of the other tests."""
    base, entry = server.service.bank.base, server.service.bank.entry(None if name == "tiny" else name)
    if entry.virtual is None:
        return np.asarray(jax.nn.log_softmax(row_logits(base, np.asarray(ids))))
    virtual = jax.tree.map(jnp.asarray, entry.virtual)
    _, hidden = run_lead(base.model, virtual, jnp.asarray(ids), return_hidden=True)
    return np.asarray(jax.nn.log_softmax(base.model.logits(hidden)))


@pytest.mark.parametrize("name", ["tiny", "front", "end"])
def test_token_ids_come_back_with_their_scores(server, name):
    """As harnesses ask for log-likelihoods; the answer after them is that of the same ids."""
    bank = server.service.bank
    given = bank.base.tokenizer.encode("a question and", add_special_tokens=False)
    entry = bank.entry(None if name == "tiny" else name)
    ids, at = (np.asarray(given), 0) if name == "tiny" else entry.encoder.prompt_ids_around(given)
    expected = scores_of(server, name, ids.tolist())
    body = {"model": name, "prompt": [given, given[:3]], "max_tokens": 1, "temperature": 0, "logprobs": 3, "echo": True}
    answer = server.post("/v1/completions", body).json()
    only = server.post("/v1/completions", {**body, "max_tokens": 0}).json()
    for choice, alone, own in zip(answer["choices"], only["choices"], body["prompt"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(own) + 1 and choice["text"].startswith(alone["text"])
        assert alone["text"] == continuation_text(bank.base.tokenizer, own) and alone["finish_reason"] == "length"
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert logprobs[key][: len(own)] == alone["logprobs"][key]
        first = 1 if at == 0 else 0
        assert logprobs["token_logprobs"][:first] == logprobs["top_logprobs"][:first] == [None] * first
        for place in range(first, len(own)):
            row = expected[at + place - 1]
            assert logprobs["token_logprobs"][place] == pytest.approx(float(row[own[place]]), abs=1e-4)
            top = logprobs["top_logprobs"][place]
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4) and 3 <= len(top) <= 4
        assert max(logprobs["top_logprobs"][-1].values()) == logprobs["token_logprobs"][-1]
    plain = {**body, "prompt": given, "echo": False}
    assert (
        server.post("/v1/completions", plain).json()["choices"][0]["text"]
        == answer["choices"][0]["text"][len(only["choices"][0]["text"]) :]
    )
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 2 * len(ids) - len(given) + 3 and only["usage"]["completion_tokens"] == 0


def test_a_text_comes_back_without_the_bos_that_was_added(server):
    bank, text = server.service.bank, "a question"
    ids = bank.base.tokenizer.encode(text)
    body = {"model": "tiny", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0, "n": 2}
    first, second = server.post("/v1/completions", body).json()["choices"]
    assert first["text"] == text == "".join(first["logprobs"]["tokens"])
    expected = scores_of(server, "tiny", ids)
    found = [float(expected[place, id_]) for place, id_ in enumerate(ids[1:])]
    np.testing.assert_allclose(first["logprobs"]["token_logprobs"], found, atol=1e-4)
    assert {**first, "index": 1} == second
    silent = server.post("/v1/completions", {**body, "logprobs": None}).json()["choices"][0]
    assert silent["text"] == text and silent["logprobs"] is None


def test_messages_as_clients_send_them(server):
    """What they add without asking for anything changes nothing."""
    turn = {"role": "user", "content": "the"}
    more = {"type": "text", "annotations": [], "tool_calls": None, "refusal": None, "audio": None}
    body = {"model": "front", "messages": [turn], "max_tokens": 4, "temperature": 0}
    extended = {**body, "messages": [{**turn, **more}], "tools": [], "tool_choice": "none", "modalities": ["text"]}
    ours, theirs = (server.post("/v1/chat/completions", own).json()["choices"] for own in (extended, body))
    assert ours == theirs and "front" in PROMPTS
