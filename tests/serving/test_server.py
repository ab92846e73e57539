"""Over HTTP, answers are those of the library itself, whoever asks at the same time; what is wrong is refused."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest

from spt_jax.data.batches import plan_batches
from spt_jax.data.encoder import Example
from spt_jax.errors import ConfigError
from spt_jax.evaluation import EvaluationConfig, EvaluationSet, make_evaluation_set, score
from spt_jax.generation import SamplingConfig, generate
from spt_jax.serving.answers import shown
from spt_jax.serving.engine import Engine, Request
from spt_jax.serving.protocol import CompletionRequest
from spt_jax.serving.worker import EngineFailedError, Worker
from tests.serving.conftest import CLASSES, KEY, PROMPTS, save, serving

ADMIN = {"authorization": f"Bearer {KEY}"}
TEXTS = ("a question", "the", "and another")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server, name, text, **options):
    """What the library answers without a server."""
    bank, prompt = server.service.bank, None if name == "tiny" else name
    ids = bank.request_ids(prompt, {"text": text})
    (found,) = generate(bank.base, [ids], bank.entry(prompt).virtual, SamplingConfig(**options))
    return ids, found


# Answers.


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
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset == [
            len("".join(choice.logprobs.tokens[:i])) for i in range(len(expected.ids))
        ]


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
            assert all(value in (theirs.get(token), ours.logprob) for token, value in told)
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


@pytest.mark.parametrize("name", ["verdict", "shifted", "gated", "head"])
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


def test_what_is_shown_of_a_text_that_grows():
    assert shown("and then", ("the end",)) == "and then"
    assert shown("and then the e", ("the end", "x")) == "and then "
    assert shown("caf\ufffd\ufffd", ()) == "caf"


# Prompts come and go.


def test_prompts_change_while_others_are_answered(server, base, folder, client):
    """A stream goes on, nothing is compiled for a prompt like others, and the new prompt answers as its own."""
    compiled = []

    def listen(name, _, **details):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name"))

    options = {"model": "front", "prompt": "the", "max_tokens": 60, "temperature": 0}
    expected = alone(server, "front", "the", max_new_tokens=60)[1].text
    server.post("/v1/completions", {"model": "end", "prompt": "the", "temperature": 0})
    save(folder / "passing", base, "front", seed=3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        stream = client.completions.create(**options, stream=True)
        text = next(stream).choices[0].text
        began = time.monotonic()
        assert server.post("/v1/prompts", {"name": "passing"}, headers=ADMIN).status_code == 201
        assert time.monotonic() - began < 1
        ours = server.post("/v1/completions", {**options, "model": "passing", "max_tokens": 8}).json()
        text += "".join(part.choices[0].text for part in stream)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [] and text == expected
    assert ours["choices"][0]["text"] == alone(server, "passing", "the", max_new_tokens=8)[1].text
    shutil.rmtree(folder / "passing")
    save(folder / "passing", base, "front", seed=4)
    assert server.post("/v1/prompts", {"name": "passing"}, headers=ADMIN).status_code == 201
    other = server.post("/v1/completions", {**options, "model": "passing", "max_tokens": 8}).json()
    assert other["choices"][0]["text"] == alone(server, "passing", "the", max_new_tokens=8)[1].text
    assert other["choices"][0]["text"] != ours["choices"][0]["text"]
    assert httpx.delete(f"{server.url}/v1/prompts/passing", headers=ADMIN).json()["deleted"]
    assert server.post("/v1/completions", {**options, "model": "passing"}).status_code == 404
    shutil.rmtree(folder / "passing")


def test_only_the_key_opens(server, base, folder):
    for given in (None, "Bearer open sesam", "Bearer \xfc", KEY[1:]):
        headers = {} if given is None else {"authorization": given.encode("latin-1")}
        assert server.post("/v1/prompts", {"name": "front"}, headers=headers).status_code == 401
        assert httpx.delete(f"{server.url}/v1/prompts/front", headers=headers).status_code == 401
    assert "front" in server.service.bank.names
    server.service.admin_key = None
    assert server.post("/v1/prompts", {"name": "front"}, headers=ADMIN).status_code == 403
    server.service.admin_key = KEY


def test_only_the_directory_of_prompts_is_read(server, base, folder, tmp_path):
    save(tmp_path / "outside", base, "front")
    (folder / "link").symlink_to(tmp_path / "outside")
    shutil.copytree(tmp_path / "outside", folder / "inner")
    (folder / "inner" / "params.safetensors").unlink(missing_ok=True)
    name = next((tmp_path / "outside").glob("*.safetensors")).name
    (folder / "inner" / name).unlink(missing_ok=True)
    (folder / "inner" / name).symlink_to(tmp_path / "outside" / name)
    for own, status in (("link", 403), ("inner", 403), ("nowhere", 404), ("tiny", 422)):
        assert server.post("/v1/prompts", {"name": own}, headers=ADMIN).status_code == status
    for own in ("../outside", "/etc", "..", ".hidden", "a/b", "a\x00b", "", "x" * 101, "%2e%2e"):
        assert server.post("/v1/prompts", {"name": own}, headers=ADMIN).status_code == 422
    (folder / "link").unlink()
    shutil.rmtree(folder / "inner")


def test_prompts_that_are_no_good(server, base, folder):
    """They are refused with what is wrong, and a prompt that was there before goes on."""
    from spt_jax.testing import tiny_base

    def given(name):
        response = server.post("/v1/prompts", {"name": name}, headers=ADMIN)
        return response.status_code, response.json()["error"]["message"]

    (folder / "bad").mkdir()
    assert given("bad")[0] == 404
    save(folder / "bad", tiny_base(seed=9), "front")
    status, message = given("bad")
    assert status == 400 and "another base" in message
    shutil.rmtree(folder / "bad")
    save(folder / "bad", base, "front")
    assert server.post("/v1/prompts", {"name": "bad"}, headers=ADMIN).status_code == 201
    arrays = next((folder / "bad").glob("*.safetensors"))
    arrays.write_bytes(arrays.read_bytes()[:-4])
    assert given("bad")[0] == 400
    body = {"model": "bad", "prompt": "the", "temperature": 0, "max_tokens": 4}
    ours = server.post("/v1/completions", body).json()
    assert ours["choices"][0]["text"] == alone(server, "front", "the", max_new_tokens=4)[1].text
    arrays.write_bytes(bytes(2**20 + 1))
    assert given("bad")[0] == 413
    shutil.rmtree(folder / "bad")
    assert httpx.delete(f"{server.url}/v1/prompts/bad", headers=ADMIN).status_code == 200


# What is refused.


def test_null_is_what_was_not_given(server):
    body = {"model": "front", "prompt": "the", "max_tokens": 4, "seed": 1}
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stream", "stop", "logprobs", "user", "best_of"))
    ours, theirs = (server.post("/v1/completions", own).json() for own in (body, {**body, **nulls}))
    assert ours["choices"] == theirs["choices"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"model": "frond", "prompt": "a"}, 404, "did you mean 'front'"),
        ("/v1/completions", {"model": "front", "prompt": "a", "max_tokens": 999}, 400, "'tiny' has 128 positions"),
        ("/v1/completions", {"model": "front", "prompt": "a " * 300}, 400, "has 128 positions"),
        ("/v1/completions", {"model": "front"}, 422, "either a prompt or fields"),
        ("/v1/completions", {"model": "front", "prompt": "a", "fields": {"text": "a"}}, 422, "either"),
        ("/v1/completions", {"model": "pair", "prompt": "a"}, 422, "question, answer"),
        ("/v1/completions", {"model": "pair", "fields": {"question": "a", "anser": "b"}}, 422, "did you mean 'answer'"),
        ("/v1/completions", {"model": "pair", "fields": {"question": "a"}}, 400, "no field 'answer'"),
        ("/v1/completions", {"model": "gated", "prompt": "a"}, 400, "/v1/classify"),
        ("/v1/completions", {"model": "front", "prompt": "a", "temperature": -1}, 422, "temperature"),
        ("/v1/completions", {"model": "front", "prompt": "a", "max_tokens": 0}, 422, "max_tokens"),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": [""]}, 422, "stop"),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": ""}, 422, "stop"),
        ("/v1/completions", {"model": "front", "prompt": "a", "presence_penalty": 1}, 422, "presence_penalty"),
        ("/v1/completions", {"model": "front", "prompt": "a", "tools": []}, 422, "tools"),
        ("/v1/completions", {"model": "front", "prompt": "a", "logprobs": 21}, 422, "logprobs"),
        (
            "/v1/chat/completions",
            {"model": "front", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            422,
            "goes with logprobs",
        ),
        ("/v1/completions", {"model": "front", "prompt": []}, 422, "prompt"),
        ("/v1/completions", {"model": "front", "prompt": [1, 2]}, 422, "prompt"),
        ("/v1/completions", {"model": "front", "prompt": "\ud800"}, 422, "prompt"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 422, "messages"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "x", "content": "a"}]}, 422, "role"),
        (
            "/v1/chat/completions",
            {"model": "front", "messages": [{"role": "system", "content": "a"}]},
            422,
            "one user's turn",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]},
            422,
            "nothing is left",
        ),
        ("/v1/classify", {"model": "tiny", "input": "a"}, 400, "bare base"),
        ("/v1/classify", {"model": "front", "input": "a"}, 400, "no classes"),
        ("/v1/classify", {"model": "verdict", "input": "a " * 300}, 400, "128"),
        ("/v1/classify", {"model": "verdict", "input": []}, 422, "input"),
    ],
)
def test_bad_requests(server, path, body, status, said):
    response = httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, said in error["message"]) == (status, True), error


def test_bad_bodies(server):
    json_type = {"content-type": "application/json"}
    for content, status in ((b"{nope", 400), (b"\xff\xfe", 400), (b"[1]", 422), (b"", 422), (b"x" * (2**20 + 1), 413)):
        response = httpx.post(f"{server.url}/v1/completions", content=content, headers=json_type)
        assert response.status_code == status and response.json()["error"]["message"], content[:10]

    def chunks():
        for _ in range(40):
            yield b"x" * 2**15

    assert httpx.post(f"{server.url}/v1/completions", content=chunks()).status_code == 413
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/completions").status_code == 405


def test_a_body_that_does_not_come(base, tmp_path):
    with serving(base, tmp_path, body_seconds=0.2) as own:
        port = int(own.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in connection.recv(1000)


def test_the_queue_has_an_end(base, tmp_path):
    """Nothing is answered here, so that what waits can be counted."""
    with serving(base, tmp_path, slots=1, queue=2, start=False) as own:
        body = {"model": "tiny", "prompt": "the", "max_tokens": 4, "seed": 1}
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(own.post("/v1/completions", body))) for _ in range(3)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            own.wait(lambda engine, number=number: engine.waiting == number)
            if number == 2:  # of three: there is no room for two more
                both = own.post("/v1/completions", {**body, "n": 2})
                assert both.status_code == 429 and own.service.worker.engine.waiting == 2
        refused = own.post("/v1/completions", {**body, "stream": True})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        never = own.post("/v1/completions", {**body, "n": 4})
        assert never.status_code == 400 and "at most 3" in never.json()["error"]["message"]
        own.service.worker.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        own.service.worker.start = lambda: None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone(server, stream):
    """Its slot is free before its answer would have been whole."""
    body = {"model": "tiny", "prompt": "the", "max_tokens": 100, "temperature": 0, "stream": stream}
    ended = server.service.metrics.text()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        server.wait(lambda engine: engine.under_way == 1)
    server.wait(lambda engine: engine.idle)

    def answers(text):
        return [line for line in text.splitlines() if line.startswith("spt_jax_answers_total")]

    assert answers(server.service.metrics.text()) == answers(ended)


def test_an_engine_that_fails(base, tmp_path):
    with serving(base, tmp_path) as own:

        def broken():
            raise RuntimeError("out of memory")

        own.service.worker.engine.step = broken
        body = {"model": "tiny", "prompt": "the"}
        assert own.get("/readyz").status_code == 200
        response = own.post("/v1/completions", body)
        assert response.status_code == 503 and "has failed" in response.json()["error"]["message"]
        assert own.post("/v1/completions", body).status_code == 503
        assert own.get("/healthz").status_code == own.get("/readyz").status_code == 503


def test_metrics(server):
    def values():
        lines = [line.split() for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines if "{" not in name}

    before = values()
    server.post("/v1/completions", {"model": "front", "prompt": "the", "max_tokens": 5, "temperature": 0, "n": 2})
    server.post("/v1/classify", {"model": "verdict", "input": list(TEXTS)})
    after = values()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["spt_jax_answers_total"] == 2 and grown["spt_jax_classified_total"] == 3
    assert 2 <= grown["spt_jax_generated_tokens_total"] <= 10
    assert grown["spt_jax_first_token_seconds_count"] == 1
    assert after["spt_jax_prompts"] == len(PROMPTS) and after["spt_jax_prompt_device_bytes"] > 0


def test_a_worker_that_stops_leaves_nobody_waiting(server):
    worker, told = Worker(Engine(server.service.bank, slots=1)), []
    good, bad = (Request(np.asarray(ids, np.int32)) for ids in ([1, 40], [1, 10_000]))
    with pytest.raises(ConfigError, match="no soft prompt"):  # all or none
        worker.submit([(good, told.append), (bad, told.append)])
    worker.submit([(good, told.append), (good, told.append)])
    worker._stopping = True
    worker.start()
    worker._thread.join()
    assert [str(news.error) for news in told] == ["the server is stopping"] * 2
    with pytest.raises(EngineFailedError, match="stopping"):
        worker.submit([(good, told.append)])
    assert not worker._listeners


def test_a_listener_that_fails_ends_its_own_request_alone(server):
    ended, worker = threading.Event(), server.service.worker

    def broken(news):
        raise RuntimeError("a listener")

    def listener(news):
        if news.result is not None:
            ended.set()

    request = Request(np.asarray([1, 40], np.int32), None, SamplingConfig(max_new_tokens=20))
    worker.submit([(request, broken), (request, listener)])
    assert ended.wait(20)
    server.wait(lambda engine: engine.idle)
    assert worker.failure is None


def test_a_prompt_that_changes_between_reading_and_asking(server, base, folder):
    """The answer is that of the prompt whose template read the text."""
    service = server.service
    save(folder / "moving", base, "front", seed=6)
    service.load("moving")
    expected = alone(server, "moving", "the", max_new_tokens=6)[1].text
    body = CompletionRequest(model="moving", prompt="the", max_tokens=6, temperature=0)
    (request,) = service.ask(body, [{"text": "the"}], 6)
    shutil.rmtree(folder / "moving")
    save(folder / "moving", base, "end", seed=1)
    service.load("moving")
    found, ended = [], threading.Event()

    def listener(news):
        found.append(news.result)
        if news.result is not None:
            ended.set()

    service.worker.submit([(request, listener)])
    assert ended.wait(20) and found[-1].text == expected
    service.bank.remove("moving")
    shutil.rmtree(folder / "moving")


def test_a_fuzz_run_finds_no_failure(server, tmp_path):
    """Schemathesis, against the server's own OpenAPI document: no 5xx, and no answer that the document does not know.

    The models that there are stand in the document that it reads, so that it gets beyond their names.
    """
    pytest.importorskip("schemathesis")
    document = server.get("/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["enum"] = ["tiny", *PROMPTS, "nobody"]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    checks = [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    ]
    command = [
        *(sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url),
        *(
            "--checks",
            ",".join(checks),
            "--max-examples",
            "20",
            "--seed",
            "1",
            "--header",
            f"Authorization: Bearer {KEY}",
        ),
        *("--phases", "examples,coverage,fuzzing", "--generation-database", "none"),
    ]
    answered = server.service.metrics.text()
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "10 selected / 10 total" in run.stdout, run.stdout
    assert server.service.metrics.text() != answered
