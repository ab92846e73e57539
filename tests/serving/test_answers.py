"""Over HTTP, answers are those of the library itself, whoever asks at the same time."""

import asyncio

import jax
import numpy as np
import openai
import pytest

from spt_jax.data.batches import plan_batches
from spt_jax.data.examples import Example
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet, make_evaluation_set, score
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.answers import shown
from spt_jax.testing import tiny_base
from tests.serving.conftest import CLASSES, PROMPTS, TEXTS, alone, bytes_of, serving


def test_models_are_the_base_and_the_prompts(client, server):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"tiny", *PROMPTS}
    assert client.models.retrieve("front").to_dict() == found["front"].to_dict()
    assert found["front"].virtual_tokens == 3 and found["front"].bytes == 3 * server.service.bank.base.config.width * 4
    assert found["pair"].fields == ["question", "answer"] and found["verdict"].classes == list(CLASSES)
    assert [found["head"].generates, found["head"].classifies] == [False, True]
    assert [found["keys"].generates, found["keys"].classifies] == [True, False]


@pytest.mark.parametrize("name", ["tiny", "front", "end", "keys"])
def test_a_completion_is_what_the_library_answers(client, server, name):
    for text in TEXTS:
        ids, expected = alone(server, name, text, max_new_tokens=9)
        ours = client.completions.create(model=name, prompt=text, max_tokens=9, temperature=0, logprobs=0)
        (choice,) = ours.choices
        assert choice.text == expected.text
        assert choice.finish_reason == ("length" if expected.finished == "length" else "stop")
        assert ours.usage.prompt_tokens == len(ids) and ours.usage.completion_tokens == len(expected.ids)
        np.testing.assert_allclose(choice.logprobs.token_logprobs, expected.log_probabilities, atol=1e-4)
        assert bytes_of(choice.logprobs.tokens).decode(errors="replace") == choice.text
        ends = [*choice.logprobs.text_offset[1:], len(choice.text)]
        pieces = [choice.text[a:b] for a, b in zip(choice.logprobs.text_offset, ends, strict=True)]
        for token, piece in zip(choice.logprobs.tokens, pieces, strict=True):
            assert token.startswith("bytes:") or piece.endswith(token)
        assert "".join(pieces) == choice.text


def test_log_probabilities_are_the_trainer_s_loss(client, server):
    bank = server.service.bank
    for name in ("front", "end", "keys"):
        ids, found = alone(server, name, "a question", max_new_tokens=6)
        ours = client.completions.create(model=name, prompt="a question", max_tokens=6, temperature=0, logprobs=0)
        whole = np.concatenate([ids, np.asarray(found.ids, np.int32)])
        example = Example(whole, np.arange(len(whole)) >= len(ids), (), 0, 0)
        plan = plan_batches([example], lead=0, batch_size=1)
        entry = bank.entry(name)
        data = EvaluationSet(entry.encoder, [{}], [example], plan, EvaluationConfig())
        trained = score(bank.base, data, entry.virtual)[0, 0]
        assert sum(ours.choices[0].logprobs.token_logprobs) == pytest.approx(trained, abs=1e-4)


def test_the_likeliest_tokens_are_told(client):
    """A greedy answer takes the first of them; a sampled one stands beside them with its own."""
    for options in ({"temperature": 0}, {"seed": 4}):
        common = {"model": "end", "max_tokens": 6, **options}
        (choice,) = client.completions.create(**common, prompt="the", logprobs=3).choices
        own = choice.logprobs
        for token, value, top in zip(own.tokens, own.token_logprobs, own.top_logprobs, strict=True):
            assert top[token] == value and 3 <= len(top) <= 4
            assert max(top.values()) == value or options != {"temperature": 0}
        turn = [{"role": "user", "content": "the"}]
        (chat,) = client.chat.completions.create(**common, messages=turn, logprobs=True, top_logprobs=3).choices
        for ours, theirs in zip(chat.logprobs.content, own.top_logprobs, strict=True):
            told = [(one.token, one.logprob) for one in ours.top_logprobs]
            assert len(told) == 3 and [value for _, value in told] == sorted(theirs.values(), reverse=True)[:3]
            named = {name.removeprefix("bytes:"): value for name, value in theirs.items()}
            assert all(value in (named.get(token), ours.logprob) for token, value in told)
        parts = client.completions.create(**common, prompt="the", logprobs=3, stream=True)
        assert [top for part in parts for top in part.choices[0].logprobs.top_logprobs] == own.top_logprobs


def test_requests_of_all_kinds_at_once(server):
    """A mixture in three slots; each is answered as it is alone."""
    cases = [(name, text) for text in TEXTS for name in ("front", "end", "keys", "tiny")]
    expected = [alone(server, *case, max_new_tokens=12)[1].text for case in cases]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as ours:
            make = ours.completions.create
            return await asyncio.gather(
                *(make(model=name, prompt=text, max_tokens=12, temperature=0) for name, text in cases[:11])
            )

    assert [answer.choices[0].text for answer in asyncio.run(ask())] == expected[:11]


def test_a_stream_is_the_whole_answer_in_parts(client):
    for options in ({"seed": 3}, {"temperature": 0}, {"seed": 4, "stop": ["e", "zz"]}, {"seed": 5, "n": 2}):
        options = {"model": "end", "prompt": "the", "max_tokens": 20, "logprobs": 0, **options}
        whole = client.completions.create(**options)
        parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert parts[-1].usage == whole.usage and not parts[-1].choices
        for choice in whole.choices:
            own = [p.choices[0] for p in parts[:-1] if p.choices[0].index == choice.index]
            assert "".join(part.text for part in own) == choice.text
            assert [p.finish_reason for p in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            found = [value for part in own for value in part.logprobs.token_logprobs]
            assert found == choice.logprobs.token_logprobs


def test_a_chat(client, server):
    bank = server.service.bank
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a question"}]
    ids = bank.base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (expected,) = generate(bank.base, [np.asarray(ids)], None, SamplingConfig(max_new_tokens=8))
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 8, "logprobs": True}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected.text and whole.usage.prompt_tokens == len(ids)
    found = [token.logprob for token in whole.choices[0].logprobs.content]
    np.testing.assert_allclose(found, expected.log_probabilities, atol=1e-4)
    parts = [part.choices[0] for part in client.chat.completions.create(**options, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == expected.text
    assert parts[0].delta.role == "assistant" and parts[-1].finish_reason == whole.choices[0].finish_reason


def test_a_chat_with_a_prompt_of_one_field(client, server):
    _, expected = alone(server, "front", "the", max_new_tokens=5)
    turn = {"role": "user", "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "e"}]}
    ours = client.chat.completions.create(model="front", messages=[turn], temperature=0, max_tokens=5)
    assert ours.choices[0].message.content == expected.text


def test_without_a_limit_a_chat_fills_the_context(client, server):
    turn = {"role": "user", "content": "a question"}
    whole = client.chat.completions.create(model="tiny", messages=[turn], seed=2)
    if whole.choices[0].finish_reason == "length":
        assert whole.usage.total_tokens == server.service.bank.base.config.max_positions


def test_fields_of_a_template(server):
    bank, record = server.service.bank, {"question": "who", "answer": "me"}
    (expected,) = generate(
        bank.base, [bank.request_ids("pair", record)], bank.entry("pair").virtual, SamplingConfig(max_new_tokens=6)
    )
    body = {"model": "pair", "fields": record, "max_tokens": 6, "temperature": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == expected.text


def test_seeds(client, base, folder):
    """The same one gives the same answer, on another server too; `n` have seeds in a row; without one, texts differ."""
    options = {"model": "front", "prompt": "the", "max_tokens": 16}
    first = [client.completions.create(**options, seed=seed).choices[0].text for seed in (7, 8)]
    assert [choice.text for choice in client.completions.create(**options, seed=7, n=2).choices] == first
    assert len({client.completions.create(**options).choices[0].text for _ in range(4)}) > 1
    with serving(base, folder, slots=1) as other:
        ours = openai.OpenAI(base_url=f"{other.url}/v1", api_key="none")
        assert ours.completions.create(**options, seed=7).choices[0].text == first[0]


def test_several_texts(client, server):
    ours = client.completions.create(model="keys", prompt=list(TEXTS), max_tokens=5, temperature=0)
    expected = [alone(server, "keys", text, max_new_tokens=5)[1].text for text in TEXTS]
    assert [choice.text for choice in ours.choices] == expected


@pytest.mark.parametrize("name", ["verdict", "shifted", "gated", "linear", "edits", "head"])
def test_classes_are_those_of_the_evaluation(server, name):
    entry = server.service.bank.entry(name)
    asked = [entry.encoder.with_any_label({"text": text}) for text in TEXTS]
    expected = score(
        server.service.bank.base,
        make_evaluation_set(server.service.bank.base, entry.encoder, asked),
        jax.tree.map(np.asarray, entry.virtual),
    )
    body = server.post("/v1/classify", {"model": name, "input": list(TEXTS)}).json()
    for own, row in zip(body["data"], expected, strict=True):
        np.testing.assert_allclose([own["log_probabilities"][label] for label in CLASSES], row, atol=1e-4)
        assert own["label"] == list(CLASSES)[int(row.argmax())]
        shares = np.exp(row) / np.exp(row).sum()
        np.testing.assert_allclose([own["probabilities"][label] for label in CLASSES], shares, atol=1e-5)
    one = server.post("/v1/classify", {"model": name, "input": {"text": TEXTS[1]}})
    assert one.status_code == 422
    (own,) = server.post("/v1/classify", {"model": name, "input": [{"text": TEXTS[1]}]}).json()["data"]
    assert own["label"] == body["data"][1]["label"]


def test_a_base_split_over_devices_answers_alike(server, folder):
    """Also four requests of a kind that come in together, and classes."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    bodies = [
        ("/v1/completions", {"model": name, "prompt": [*TEXTS, "a word"], "max_tokens": 6, "temperature": 0})
        for name in ("front", "end", "keys")
    ]
    with serving(tiny_base(mesh=mesh), folder, slots=4) as split:
        for path, body in bodies:
            ours, theirs = (own.post(path, body).json()["choices"] for own in (split, server))
            assert ours == theirs
        ours, theirs = (
            own.post("/v1/classify", {"model": "verdict", "input": list(TEXTS)}).json()["data"]
            for own in (split, server)
        )
    for own, other in zip(ours, theirs, strict=True):
        assert own["log_probabilities"] == pytest.approx(other["log_probabilities"], abs=1e-4)


def test_what_is_shown_of_a_text_that_grows():
    assert shown("and then", ("the end",)) == "and then"
    assert shown("and then the e", ("the end", "x")) == "and then "
    assert shown("caf\ufffd\ufffd", ()) == "caf"


@pytest.mark.parametrize("name", ["verdict", "head"])
def test_a_classifier_answers_its_class_at_the_openai_endpoints(client, server, name):
    """The likeliest class of each text, whatever the temperature, with a note that says so."""
    found = server.post("/v1/classify", {"model": name, "input": list(TEXTS)}).json()["data"]
    expected = [own["label"] for own in found]
    whole = client.completions.create(model=name, prompt=list(TEXTS), temperature=2, n=2)
    assert [choice.text for choice in whole.choices] == [label for label in expected for _ in range(2)]
    encoder = server.service.bank.entry(name).encoder
    assert whole.usage.prompt_tokens == sum(len(encoder.prompt_ids({"text": text})) for text in TEXTS)
    assert whole.usage.completion_tokens == 0 and whole.choices[0].finish_reason == "stop"
    assert f"{name!r} is a classifier" in whole.note and "/v1/classify" in whole.note
    messages = [{"role": "user", "content": TEXTS[0]}]
    chat = client.chat.completions.create(model=name, messages=messages)
    assert chat.choices[0].message.content == expected[0] and chat.note == whole.note
    usage = {"include_usage": True}
    pieces = list(client.completions.create(model=name, prompt=TEXTS[0], stream=True, stream_options=usage))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected[0]
    assert pieces[-1].usage.prompt_tokens == chat.usage.prompt_tokens and pieces[0].note == whole.note
    chunks = list(client.chat.completions.create(model=name, messages=messages, stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks] == [expected[0], None]
    assert chunks[-1].choices[0].finish_reason == "stop"
    plain = client.completions.create(model="front", prompt="a", max_tokens=1)
    assert not hasattr(plain, "note") or plain.note is None
