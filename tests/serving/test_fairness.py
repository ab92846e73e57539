"""Whose turn it is: clients take turns, and a request of many answers leaves room for others."""

import asyncio
import threading
import time

import httpx
import numpy as np
import pytest

from spt_jax.inference.generation import SamplingConfig
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.fairness import Lane, Sender, Turns, has_share, sender_of
from spt_jax.serving.requests import Request
from tests.serving.conftest import serving


def test_clients_take_turns_and_so_do_their_requests():
    turns: Turns[str] = Turns()
    for client, request, items in (("a", 1, "uvw"), ("a", 2, "xy"), ("b", 3, "z")):
        for item in items:
            turns.add(Sender(client, request), item)
    turns.remove(Sender("a", 1), "v")
    turns.remove(Sender("a", 1), "v")
    assert len(turns) == 5
    assert turns.take(lambda sender, _: sender.request == 2) == "x"
    assert [turns.take() for _ in range(5)] == ["z", "u", "y", "w", None]
    turns.remove(Sender("c", 4), "u")
    assert len(turns) == 0


def test_a_client_is_an_address_and_a_key():
    def client(address: str, *headers: tuple[bytes, bytes]) -> str:
        return sender_of({"type": "http", "client": (address, 1), "headers": headers}).client

    key = (b"authorization", b"Bearer one")
    assert client("1.2.3.4", key) == client("1.2.3.4", key, (b"user-agent", b"x"))
    assert len({client("1.2.3.4"), client("1.2.3.4", key), client("1.2.3.5", key)}) == 3
    scope = {"type": "http", "client": None, "headers": []}
    assert sender_of(scope).request != sender_of(scope).request


@pytest.mark.parametrize(
    ("taken", "client", "count", "expected"),
    [
        ({}, "a", 12, True),
        ({"a": 8}, "a", 5, False),
        ({"a": 12}, "b", 6, True),
        ({"a": 12}, "b", 7, False),
        ({"a": 12, "b": 6}, "c", 4, True),
        ({"a": 12, "b": 6, "c": 4}, "d", 3, False),  # twice the limit is never passed
        ({"a": 0, "b": 12}, "c", 6, True),
    ],
)
def test_a_queue_that_is_full_takes_a_share_of_each_client(taken, client, count, expected):
    assert has_share(taken, client, count, limit=12) is expected


@pytest.mark.parametrize(("slots", "held"), [(16, [14, 1, 1]), (8, [7, 0, 1]), (4, [4, 0, 0])])
def test_many_answers_of_one_request_leave_slots_to_others(base, slots, held, monkeypatch):
    """One more request of the same client, then one of another client; and the answers are those of each alone."""
    monkeypatch.setattr("spt_jax.serving.engine.POLL_SECONDS", 0.0)  # a token a step, so that nothing ends meanwhile
    engine = Engine(PromptBank(base), slots=slots)
    engine._steps = 1

    def request(client: str, number: int) -> Request:
        ids = np.asarray([1, 40, 41 + number], np.int32)
        return Request(ids, None, SamplingConfig(max_new_tokens=30), sender=Sender(client, number))

    many = [engine.submit(request("one", 0)) for _ in range(20)]
    engine.step()
    other, stranger = engine.submit(request("one", 1)), engine.submit(request("two", 2))
    for _ in range(2):
        engine.step()
    busy = [ticket for ticket in engine._busy if ticket is not None]
    assert [sum(t in busy for t in tickets) for tickets in (many, [other], [stranger])] == held
    while not engine.idle:
        engine.step()
    expected = Engine(engine.bank, slots=1).generate([request("alone", number) for number in range(3)])
    for ticket, own in zip((many[0], other, stranger), expected, strict=True):
        assert ticket.result is not None and ticket.result.ids == own.ids
    assert all(ticket.result is not None for ticket in many)


def test_a_lane_does_the_work_of_others_between():
    lane, order, hold = Lane("test"), [], threading.Event()

    async def ask(sender: Sender, name: str) -> None:
        await lane.run(sender, lambda: order.append(name))

    async def run() -> None:
        first = asyncio.create_task(lane.run(Sender("a", 0), hold.wait))
        many = [asyncio.create_task(ask(Sender("a", 1), f"a{i}")) for i in range(3)]
        others = [asyncio.create_task(ask(Sender("b", 2), "b")), asyncio.create_task(ask(Sender("c", 3), "c"))]
        await asyncio.sleep(0.05)
        many[1].cancel()
        await asyncio.sleep(0.05)  # until the cancellation has reached the lane
        hold.set()
        await asyncio.gather(first, many[0], many[2], *others)
        with pytest.raises(ZeroDivisionError):
            await lane.run(Sender("a", 4), lambda: 1 // 0)

    asyncio.run(run())
    assert order == ["a0", "b", "c", "a2"]


def test_a_short_request_does_not_wait_for_256_answers(base, tmp_path):
    """Nor is it refused while one client has filled the queue."""
    many = {"model": "tiny", "prompt": ["the"] * 16, "n": 16, "max_tokens": 100, "temperature": 0}
    short = {"model": "tiny", "prompt": "a question", "max_tokens": 2, "temperature": 0}
    with serving(base, tmp_path, slots=16, queue=240) as own:
        alone = own.post("/v1/completions", short).json()
        own.post("/v1/completions", {**many, "n": 1})
        answers = []
        thread = threading.Thread(target=lambda: answers.append(own.post("/v1/completions", many)))
        thread.start()
        own.wait(lambda engine: engine.under_way >= 14)
        seconds = []
        for key in ("one", "two", "three"):
            began = time.monotonic()
            ours = own.post("/v1/completions", short, headers={"authorization": f"Bearer {key}"})
            seconds.append(time.monotonic() - began)
            assert ours.json()["choices"] == alone["choices"]
        assert own.service.worker.engine.waiting > 100 and not answers
        thread.join()
        assert max(seconds) < 2
    (answer,) = answers
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 256
    assert len({choice["text"] for choice in answer.json()["choices"]}) == 1


def test_a_long_text_holds_up_nobody(base, tmp_path):
    """One that cannot fit is refused before it is tokenized; others answer meanwhile."""
    with serving(base, tmp_path, slots=2, queue=99) as own:
        short = {"model": "tiny", "prompt": "a question", "max_tokens": 2, "temperature": 0}
        own.post("/v1/completions", short)
        long = {"model": "tiny", "prompt": "word " * 190_000, "max_tokens": 2}
        began = time.monotonic()
        refused = own.post("/v1/completions", long)
        assert refused.status_code == 400 and time.monotonic() - began < 1
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded" and "950000 bytes of text are too long" in error["message"]
        own.service._bound = None  # as for a tokenizer whose tokens have no longest: the text is tokenized
        answers, seconds = [], []
        threads = [threading.Thread(target=lambda: answers.append(own.post("/v1/completions", long))) for _ in range(3)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=own.url, timeout=60) as http:
            while any(thread.is_alive() for thread in threads):
                began = time.monotonic()
                assert http.get("/healthz").status_code == 200
                seconds.append(time.monotonic() - began)
                assert http.post("/v1/completions", json=short).status_code == 200
                seconds.append(time.monotonic() - began)
                time.sleep(0.02)
        assert len(seconds) > 10 and max(seconds) < 2 and sorted(seconds)[len(seconds) // 2] < 0.5
        assert {answer.status_code for answer in answers} == {400}
