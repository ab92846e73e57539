"""A server over a tiny base and a directory of prompts, in a thread of this process."""

import contextlib
import re
import threading
import time
from pathlib import Path

import httpx
import jax
import openai
import pytest

import spt_jax
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import (
    DecomposedPromptTuning,
    DeepPrompts,
    LlamaAdapter,
    PrefixTuning,
    PrefixTuningPlus,
    PromptTuning,
    RepresentationFinetuning,
)
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.server import make_app, server_of
from spt_jax.serving.service import Service
from spt_jax.serving.worker import Worker
from spt_jax.testing import tiny_base

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
KEY = "open sesame"
ADMIN = {"authorization": f"Bearer {KEY}"}
TEXTS = ("a question", "the", "and another")
CLASSES = {"good": " yes", "bad": " no way", "ugly": " maybe"}
PROMPTS = {
    "front": (PromptTuning(length=3), "<soft>{text}\n", {}),
    "end": (PromptTuning(length=5), "Say {text}\n<soft>", {}),
    "keys": (PrefixTuning(length=4), "A word: {text}\n", {}),
    "pair": (PromptTuning(length=2), "<soft>{question} {answer}\n", {}),
    "verdict": (PromptTuning(length=3), "<soft>{text}\n", CLASSES),
    "shifted": (DecomposedPromptTuning(length=3, rank=2, span=16), "<soft>{text}\n", CLASSES),
    "gated": (LlamaAdapter(length=2, layers=1), "{text}\n", CLASSES),
    "linear": (PrefixTuningPlus(), "{text}\n", CLASSES),
    "edits": (RepresentationFinetuning(rank=2), "{text}\n", CLASSES),
    "head": (DeepPrompts(length=3, classes=3), "{text}\n", CLASSES),
}


def save(folder: Path, base, name: str, seed: int = 0) -> None:
    """A prompt that nobody trained, far enough from its start to change every answer."""
    method, prompt, classes = PROMPTS[name]
    params = jax.tree.map(lambda a: a + 0.2, method.init_params(jax.random.key(seed), base))
    template = spt_jax.Template(
        prompt=prompt,
        target="{label}",
        virtual_tokens=method.token_count,
        verbalizers=classes,
        head=getattr(method, "head", None) or "language_model",
    )
    spt_jax.save_prompt(folder, base, method, method.materialize(params, base.model), template)


class Server:
    """A server under test: where it is, and what it serves."""

    def __init__(self, service: Service, url: str):
        self.service, self.url = service, url

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def wait(self, condition) -> None:
        """Until the condition holds, which takes milliseconds."""
        deadline = time.monotonic() + 20
        while not condition(self.service.worker.engine):
            assert time.monotonic() < deadline
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    base,
    folder: Path,
    *,
    engine: Engine | None = None,
    slots: int = 3,
    queue: int = 8,
    start: bool = True,
    head_seconds: float = 30.0,
    **options,
):
    """Runs a server; `start` False leaves its engine asleep."""
    engine = engine or Engine(PromptBank(base), slots=slots)
    service = Service(Worker(engine, queue=queue), "tiny", folder, KEY, 2**20)
    for own in sorted(folder.iterdir()):
        service.load(own.name)
    if start:
        service.worker.start()
    server = server_of(make_app(service, **options), head_seconds=head_seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(service, f"http://127.0.0.1:{port}")
    finally:
        if not start:
            service.worker.start()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="package")
def base():
    base = tiny_base()
    base.tokenizer.chat_template = CHAT
    return base


@pytest.fixture(scope="package")
def folder(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name in PROMPTS:
        save(folder / name, base, name)
    return folder


@pytest.fixture(scope="module")
def server(base, folder):
    """Of one module: between two, compiled programs may be forgotten."""
    with serving(base, folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server, name, text, **options):
    """What the library answers without a server."""
    bank, prompt = server.service.bank, None if name == "tiny" else name
    ids = bank.request_ids(prompt, {"text": text})
    (found,) = generate(bank.base, [ids], bank.entry(prompt).virtual, SamplingConfig(**options))
    return ids, found


def bytes_of(names: list[str]) -> bytes:
    """The bytes of tokens as completions name them."""
    escaped = [name.removeprefix("bytes:") if re.fullmatch(r"bytes:(\\x..)+", name) else None for name in names]
    parts = [
        name.encode() if own is None else bytes.fromhex(own.replace("\\x", ""))
        for name, own in zip(names, escaped, strict=True)
    ]
    return b"".join(parts)
