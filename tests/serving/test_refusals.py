"""What is wrong is refused, in words that help; nobody who vanishes or fails harms another."""

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
import pytest

from spt_jax.errors import ConfigError
from spt_jax.inference.generation import SamplingConfig
from spt_jax.serving.engine import Engine
from spt_jax.serving.protocol import CompletionRequest
from spt_jax.serving.requests import Request
from spt_jax.serving.worker import EngineFailedError, Worker
from tests.serving.conftest import KEY, PROMPTS, TEXTS, alone, save, serving


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
        ("/v1/completions", {"model": "gated", "prompt": "a", "logprobs": 0}, 422, "/v1/classify"),
        ("/v1/completions", {"model": "verdict", "prompt": [5, 6]}, 422, "does not take token ids"),
        ("/v1/completions", {"model": "front", "prompt": "a", "temperature": -1}, 422, "temperature"),
        ("/v1/completions", {"model": "front", "prompt": "a", "max_tokens": 0}, 422, "max_tokens"),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": [""]}, 422, "stop"),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": ""}, 422, "stop: Value should have at least 1"),
        ("/v1/completions", {"model": "front", "prompt": "a", "presence_penalty": 1}, 422, "presence_penalty"),
        ("/v1/completions", {"model": "front", "prompt": "a", "tools": []}, 422, "tools"),
        ("/v1/completions", {"model": "front", "prompt": "a", "logprobs": 21}, 422, "logprobs"),
        (
            "/v1/chat/completions",
            {"model": "front", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            422,
            "needs logprobs",
        ),
        ("/v1/completions", {"model": "front", "prompt": []}, 422, "prompt"),
        ("/v1/completions", {"model": "front", "prompt": ["a", 2]}, 422, "prompt.1: Input should be a valid string"),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 10_000]}, 400, "token id 10000: the base has 320 tokens"),
        ("/v1/completions", {"model": "front", "prompt": [1, 320]}, 400, "token id 320: the base has 320 tokens"),
        ("/v1/completions", {"model": "pair", "prompt": [5, 6]}, 422, "question, answer"),
        ("/v1/completions", {"model": "tiny", "prompt": [[1, -1]]}, 422, "prompt.0.1: Input should be greater"),
        ("/v1/completions", {"model": "tiny", "prompt": [1, True]}, 422, "prompt.1: Input should be a valid integer"),
        ("/v1/completions", {"model": "tiny", "prompt": [5] * 128}, 400, "'tiny' has 128 positions"),
        ("/v1/completions", {"model": "front", "prompt": "a", "echo": True}, 422, "as token ids"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "echo": True, "stream": True}, 422, "stream"),
        ("/v1/completions", {"model": "verdict", "prompt": "a", "echo": True}, 422, "/v1/classify"),
        (
            "/v1/chat/completions",
            {"model": "verdict", "messages": [{"role": "user", "content": "a"}], "logprobs": True},
            422,
            "/v1/classify",
        ),
        (
            "/v1/chat/completions",
            {"model": "front", "messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            422,
            "tools",
        ),
        ("/v1/completions", {"model": "front", "prompt": "\ud800"}, 422, "prompt"),
        ("/v1/completions", {"model": "front\udfff", "prompt": "a"}, 422, "model"),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": ["\ud800"]}, 422, "stop"),
        ("/v1/completions", {"model": "front", "prompt": "a", "x\ud800": 1}, 422, ""),
        ("/v1/completions", {"model": "pair", "fields": {"question\ud800": "a"}}, 422, "fields"),
        ("/v1/classify", {"model": "verdict", "input": ["\ud800"]}, 422, "input.0"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 422, "messages"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "x", "content": "a"}]}, 422, "role"),
        (
            "/v1/chat/completions",
            {"model": "front", "messages": [{"role": "system", "content": "a"}]},
            422,
            "a single user turn",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]},
            422,
            "nothing to answer",
        ),
        ("/v1/classify", {"model": "tiny", "input": "a"}, 400, "bare base"),
        ("/v1/classify", {"model": "front", "input": "a"}, 400, "does not classify"),
        ("/v1/classify", {"model": "verdict", "input": "a " * 300}, 400, "128"),
        ("/v1/classify", {"model": "verdict", "input": []}, 422, "input"),
    ],
)
def test_bad_requests(server, path, body, status, said):
    response = httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, said in error["message"]) == (status, True), error
    assert "[" not in (error.get("param") or "") and " at 0x" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "front", "prompt": "a", **{f"unknown{i}": i for i in range(40_000)}}),
        ("/v1/completions", {"model": "front", "prompt": "a", **{f"{i:02d}" + "x" * 9_000: i for i in range(90)}}),
        ("/v1/completions", {"model": "front", "prompt": [{}] * 60_000}),
        ("/v1/completions", {"model": "front", "prompt": [[None] * 400] * 400}),
        ("/v1/completions", {"model": "pair", "fields": {f"f{i}": i for i in range(50_000)}}),
        ("/v1/completions", {"model": "front", "prompt": "a", "stop": list(range(60_000))}),
        ("/v1/completions", {"model": "front", "prompt": "a", "logit_bias": {f"{i}": "x" for i in range(60_000)}}),
        ("/v1/completions", {"model": "pair", "fields": {"q" * 900_000: "a"}}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{f"{i}": 0 for i in range(90)}] * 900}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [{}] * 90_000}]}),
        ("/v1/classify", {"model": "verdict", "input": [{"text": 1}] * 60_000}),
    ],
)
def test_a_bad_body_is_answered_in_a_few_words_and_at_once(server, path, body):
    """Others wait for the time in which problems are listed: their number is bounded, and each is."""
    content = json.dumps(body).encode()
    assert len(content) < 2**20
    began = time.monotonic()
    response = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422 and len(response.content) < 3000
    assert response.json()["error"]["message"].count("; ") <= 10
    assert time.monotonic() - began < 2


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
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in connection.recv(1000)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_is_not_said_to_be_json(server, kind):
    content = b'{"model": "verdict", "input": "a"}'
    headers = {} if kind is None else {"content-type": kind}
    response = httpx.post(server.url + "/v1/classify", content=content, headers=headers)
    assert response.status_code == 415 and "Content-Type: application/json" in response.json()["error"]["message"]
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(server.url + "/v1/classify", content=content, headers=headers).status_code == 200


def test_a_connection_that_stays_silent_is_closed(base, tmp_path):
    """Before its first request, within a head, and within the head of a further request; not while it is answered."""
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    with serving(base, tmp_path, head_seconds=0.5) as own:
        port = int(own.url.rsplit(":", 1)[1])
        for sent, answered in ((b"", False), (get, False), (get + b"\r\n" + get, True)):
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                received = b"".join(iter(lambda connection=connection: connection.recv(1000), b""))
            assert (b'"ok"' in received) is answered and 0.4 < time.monotonic() - began < 10
        step = own.service.worker.engine.step
        own.service.worker.engine.step = lambda: time.sleep(0.4) or step()
        slow = own.post("/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 40, "temperature": 0})
        assert slow.status_code == 200 and slow.elapsed.total_seconds() > 0.6


def test_classification_has_a_queue_with_an_end(base, tmp_path, monkeypatch):
    save(tmp_path / "verdict", base, "verdict")
    with serving(base, tmp_path, slots=1, queue=2) as own:
        held, score = threading.Event(), own.service.classifier.score
        monkeypatch.setattr(own.service.classifier, "score", lambda *asked: held.wait() and score(*asked))
        body, answers = {"model": "verdict", "input": "the"}, []
        threads = [threading.Thread(target=lambda: answers.append(own.post("/v1/classify", body))) for _ in range(2)]
        for thread in threads:
            thread.start()
        own.wait(lambda _: own.service._placed.total() == 2)
        refused = own.post("/v1/classify", body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        completed = own.post("/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 1})
        assert completed.status_code == 200  # meanwhile
        held.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_what_is_compiled_waits_for_nothing_that_is_not(base, tmp_path, monkeypatch):
    """Many requests of a length that no program is for yet do not take up the threads of others."""
    with serving(base, tmp_path, slots=1, queue=99) as own:
        engine, held = own.service.worker.engine, threading.Event()
        short = {"model": "tiny", "prompt": "the", "max_tokens": 1}
        assert own.post("/v1/completions", short).status_code == 200
        warm, answers = engine.warm, []
        monkeypatch.setattr(engine, "warm", lambda *asked: held.wait() and warm(*asked))
        long = {**short, "prompt": "the " * 20}
        threads = [
            threading.Thread(target=lambda: answers.append(own.post("/v1/completions", long))) for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)  # all of them wait
        assert own.post("/v1/completions", short).status_code == 200 and not answers
        held.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 40


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/classify"])
def test_a_prompt_whose_numbers_overflow_is_named(base, tmp_path, path):
    name = "verdict" if path == "/v1/classify" else "front"
    save(tmp_path / name, base, name)
    with serving(base, tmp_path) as own:
        entry = own.service.bank.entry(name)
        own.service.bank._put("huge", jax.tree.map(lambda a: np.full_like(a, np.inf), entry.virtual), entry.template)
        refused = own.post(path, {"model": "huge", "prompt" if path.endswith("completions") else "input": "the"})
        assert (
            refused.status_code == 400 and "'huge' produces values that overflow" in refused.json()["error"]["message"]
        )
        if path == "/v1/completions":
            streamed = own.post(path, {"model": "huge", "prompt": "the", "stream": True})
            assert "'huge' produces values that overflow" in streamed.text and "NaN" not in streamed.text
        body = {"model": name, "prompt" if path.endswith("completions") else "input": "the"}
        assert own.post(path, body).status_code == 200


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
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
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
        return {name: float(value) for name, value in lines}

    before = values()
    server.post("/v1/completions", {"model": "front", "prompt": "the", "max_tokens": 5, "temperature": 0, "n": 2})
    server.post("/v1/classify", {"model": "verdict", "input": list(TEXTS)})
    server.post("/v1/classify", {"model": "nobody", "input": "a"})
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['spt_jax_responses_total{status="200"}'] == 3  # the metrics before among them
    assert grown['spt_jax_responses_total{status="404"}'] == 1
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
    assert [str(update.error) for update in told] == ["the server is stopping"] * 2
    with pytest.raises(EngineFailedError, match="stopping"):
        worker.submit([(good, told.append)])
    assert not worker._listeners


def test_a_listener_that_fails_ends_its_own_request_alone(server):
    ended, worker = threading.Event(), server.service.worker

    def broken(update):
        raise RuntimeError("a listener")

    def listener(update):
        if update.result is not None:
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

    def listener(update):
        found.append(update.result)
        if update.result is not None:
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
