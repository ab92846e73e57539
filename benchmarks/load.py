"""Sends 10,000 HTTP requests from clients of all kinds at once, and checks how each is answered. See `serve.py`."""

import asyncio
import collections
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 64
KEY = "benchmark"
MANY = {"prompt": ["Where is my parcel?"] * 16, "n": 16, "max_tokens": 128, "temperature": 0}
LONG = {"prompt": "word " * 200_000, "max_tokens": 8}
TEXTS = ("Where is my parcel?", "play some jazz", "what will it be like outside tomorrow", "book a table " * 12)


def start(prompts: Path, *words: str) -> tuple[subprocess.Popen[str], str, float]:
    """Starts a server; returns its process, its URL and the seconds until it was ready."""
    environment = {**os.environ, "SPT_JAX_ADMIN_KEY": KEY}
    command = [sys.executable, "-m", "spt_jax", "serve", "--base", "starter", "--prompts", str(prompts), "--port", "0"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"http://\S+", line):
            httpx.get(f"{found[0]}/readyz").raise_for_status()
            return process, found[0], time.perf_counter() - started
    raise RuntimeError(f"the server ended with {process.wait()}")


def resident_mib(process: subprocess.Popen[str]) -> float:
    """Returns the current resident memory of the server."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)[0]) / 1024


class Load:
    """Requests of a few kinds from many clients, and their outcomes."""

    def __init__(self, url: str, names: list[str], requests: int):
        self.url, self.names = url, names
        self.left = requests
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.expected: dict[tuple[str, str, int], str] = {}
        self.seconds: list[float] = []
        self.dice = random.Random(0)

    def drawn(self) -> dict[str, Any]:
        """Draws a request body. Some name a prompt that does not exist, and some ask for too many tokens."""
        body: dict[str, Any] = {"model": self.dice.choice(self.names), "prompt": self.dice.choice(TEXTS)}
        body |= {"max_tokens": self.dice.choice((1, 4, 8, 16, 32)), "temperature": 0}
        if self.dice.random() < 0.01:
            body["model"] = "nobody"
        if self.dice.random() < 0.01:
            body["max_tokens"] = 1000
        return body

    async def client(self, http: httpx.AsyncClient) -> None:
        """Sends requests until none are left."""
        while self.left > 0:
            self.left -= 1
            body, kind = self.drawn(), self.dice.choices(("whole", "stream", "leaves", "vanishes"), (60, 30, 5, 5))[0]
            try:
                self.outcomes[await self.ask(http, body, kind)] += 1
            except httpx.HTTPError as error:
                self.outcomes[f"failed: {type(error).__name__}"] += 1

    async def ask(self, http: httpx.AsyncClient, body: dict[str, Any], kind: str) -> str:
        """Sends one request and returns its outcome."""
        started = time.perf_counter()
        if kind == "vanishes":
            try:
                response = await http.post("/v1/completions", json=body, timeout=self.dice.choice((0.005, 0.02, 0.1)))
            except httpx.TimeoutException:
                return "left before its answer"
            if response.status_code != 200:
                return self.refused(response.status_code, body)
            return "answered before it left"
        if kind in ("stream", "leaves"):
            pieces = []
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    return self.refused(response.status_code, body)
                async for line in response.aiter_lines():
                    pieces += [line.removeprefix("data: ")] if line else []
                    if kind == "leaves":
                        return "left before its answer"
            if pieces[-1] != "[DONE]":
                return "wrong: an unfinished stream"
            import json

            text = "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces[:-1])
        else:
            response = await http.post("/v1/completions", json=body)
            if response.status_code != 200:
                return self.refused(response.status_code, body)
            text = response.json()["choices"][0]["text"]
        self.seconds.append(time.perf_counter() - started)
        key = body["model"], body["prompt"], body["max_tokens"]
        return "answered" if text == self.expected.setdefault(key, text) else "wrong: another text"

    @staticmethod
    def refused(status: int, body: dict[str, Any]) -> str:
        right = {404: body["model"] == "nobody", 400: body["max_tokens"] == 1000, 429: True}
        return f"refused: {status}" if right.get(status) else f"wrong: {status}"


def load(prompts: Path, requests: int) -> dict[str, Any]:
    """Starts a server with all prompts, sends it requests, adds prompts meanwhile, and stops it."""
    return asyncio.run(_load(prompts, requests))


async def _load(prompts: Path, requests: int) -> dict[str, Any]:
    process, url, ready = start(prompts)
    names = sorted(path.name for path in prompts.iterdir())
    memory, added = [], []
    try:
        limits = httpx.Limits(max_connections=CLIENTS + 2)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            own = Load(url, ["starter", *names], requests)
            for text in TEXTS:  # compiles the programs of every kind of request
                await http.post("/v1/completions", json={"model": names[0], "prompt": text, "max_tokens": 4})
                await http.post("/v1/completions", json={"model": "starter", "prompt": text, "max_tokens": 4})
            started = time.perf_counter()
            clients = [asyncio.create_task(own.client(http)) for _ in range(CLIENTS)]
            while not all(client.done() for client in clients):
                await asyncio.wait(clients, timeout=5)
                memory.append(resident_mib(process))
                at = time.perf_counter()
                headers = {"authorization": f"Bearer {KEY}"}
                response = await http.post("/v1/prompts", json={"name": names[len(memory) % 1000]}, headers=headers)
                response.raise_for_status()
                added.append(time.perf_counter() - at)
            seconds = time.perf_counter() - started
            metrics = (await http.get("/metrics")).text
            repeated = await _again(http, own)
        beside = {"256 answers": await _beside(url, names, MANY), "8 long texts": await _beside(url, names, LONG, 8)}
        flood = await _flood(url, names)
        drained = await _drain(process, url, names)
    finally:
        process.kill()
        process.communicate()
    half = len(memory) // 2
    tokens = float(re.findall(r"^spt_jax_generated_tokens_total (\S+)$", metrics, re.MULTILINE)[0])
    return {
        "requests": requests,
        "clients": CLIENTS,
        "outcomes": dict(sorted(own.outcomes.items())),
        "answers_checked_alone_afterwards": repeated,
        "seconds_beside": beside,
        "flood": flood,
        "streams_that_ended_after_sigterm": drained,
        "seconds": seconds,
        "requests_per_second": requests / seconds,
        "tokens_per_second": tokens / seconds,
        "answer_seconds": {
            "median": statistics.median(own.seconds),
            "99 %": statistics.quantiles(own.seconds, n=100)[98],
        },
        "ready_seconds_with_1000_prompts": ready,
        "ready_seconds_with_1_prompt": _ready_with_one(prompts),
        "prompt_added_seconds": {"median": statistics.median(added), "max": max(added), "times": len(added)},
        "resident_mib": {
            "start": memory[0],
            "middle": memory[half],
            "end": memory[-1],
            "growth_of_the_second_half": memory[-1] / memory[half] - 1,
        },
    }


async def _beside(url: str, names: list[str], body: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """Measures how long a short request and /healthz wait while another client sends large requests."""
    short = {"model": names[0], "prompt": TEXTS[0], "max_tokens": 4, "temperature": 0}
    waited: dict[str, list[float]] = {"same client": [], "other client": [], "/healthz": []}
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await http.post("/v1/completions", json={**short, "max_tokens": body["max_tokens"]})
        started = time.perf_counter()
        many = [
            asyncio.create_task(http.post("/v1/completions", json={"model": names[1], **body})) for _ in range(times)
        ]
        while not all(one.done() for one in many) or not waited["/healthz"]:
            for kind, seconds in waited.items():
                headers = {"authorization": "Bearer other"} if kind == "other client" else {}
                at = time.perf_counter()
                if kind == "/healthz":
                    response = await http.get(kind)
                else:
                    response = await http.post("/v1/completions", json=short, headers=headers)
                response.raise_for_status()
                seconds.append(time.perf_counter() - at)
            await asyncio.sleep(0.05)
        statuses = collections.Counter([(await one).status_code for one in many])
        whole = time.perf_counter() - started
    found = {kind: {"median": statistics.median(own), "max": max(own)} for kind, own in waited.items()}
    return {"statuses": dict(statuses), "seconds": whole, "times": len(waited["/healthz"]), **found}


async def _flood(url: str, names: list[str], clients: int = 600) -> dict[str, int]:
    """Sends more simultaneous requests than slots and queue hold."""
    found: collections.Counter[str] = collections.Counter()

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        body = {"model": names[number % len(names)], "prompt": TEXTS[0], "max_tokens": 32, "temperature": 0}
        response = await http.post("/v1/completions", json=body)
        retry = "retry-after" in response.headers
        found[f"{response.status_code}{' with Retry-After' if retry else ''}"] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(ask(http, number) for number in range(clients)))
    return dict(found)


async def _drain(process: subprocess.Popen[str], url: str, names: list[str], count: int = 32) -> dict[str, int]:
    """Sends SIGTERM while streams are open; the server must end by itself."""
    found: collections.Counter[str] = collections.Counter()
    streaming = asyncio.Event()

    async def ask(http: httpx.AsyncClient, name: str) -> None:
        body = {"model": name, "prompt": TEXTS[0], "max_tokens": 150, "temperature": 0, "stream": True}
        last = ""
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                last = line or last
                streaming.set()
        found["whole" if last == "data: [DONE]" else "cut off"] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=count)) as http:
        asked = [asyncio.create_task(ask(http, name)) for name in names[:count]]
        await streaming.wait()
        await asyncio.sleep(0.2)  # until the last of them have arrived
        process.terminate()
        await asyncio.gather(*asked)
    await asyncio.to_thread(process.wait, 90)
    return dict(found)


async def _again(http: httpx.AsyncClient, own: Load, count: int = 300) -> dict[str, int]:
    """Requests some of the answers again, each one separately."""
    found: collections.Counter[str] = collections.Counter()
    for name, text, tokens in random.Random(1).sample(sorted(own.expected), min(count, len(own.expected))):
        body = {"model": name, "prompt": text, "max_tokens": tokens, "temperature": 0}
        response = await http.post("/v1/completions", json=body)
        same = response.json()["choices"][0]["text"] == own.expected[name, text, tokens]
        found["same" if same else "another text"] += 1
    return dict(found)


def _ready_with_one(prompts: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "p0000"
        own.mkdir()
        for file in (prompts / "p0000").iterdir():
            (own / file.name).write_bytes(file.read_bytes())
        process, _, ready = start(Path(folder))
        process.terminate()
        process.communicate(timeout=60)
    return ready
