"""`spt-jax serve` as its users run it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import jax
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.bases.base import STARTER
from spt_jax.commands.serve import ADMIN_KEY, Serve, note_long_prompts
from spt_jax.commands.serve import start as start_service
from tests.quick import QUICK_FLAGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    base, method = spt_jax.load_base("starter"), spt_jax.PromptTuning(length=4)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    spt_jax.save_prompt(folder / "story", base, method, virtual, template)
    return folder


def start(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and where it listens."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS, ADMIN_KEY: "key"}
    command = [sys.executable, "-m", "spt_jax", "serve", "--port", "0", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0]
    raise AssertionError(f"the server ended with {process.wait()}")


def test_it_serves_and_drains(folder):
    """After SIGTERM, what is under way comes to its end."""
    process, url = start("--base", str(STARTER), "--prompts", str(folder), "--slots", "2", "--name", "starter")
    try:
        assert httpx.get(f"{url}/readyz").json() == {"status": "ok", "compiling": 0}
        assert [own["id"] for own in httpx.get(f"{url}/v1/models").json()["data"]] == ["starter", "story"]
        body = {"model": "story", "prompt": "Once", "max_tokens": 240, "temperature": 0, "stream": True}
        parts = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                parts += [line.removeprefix("data: ")] if line else []
                if len(parts) == 1:
                    process.send_signal(signal.SIGTERM)
        assert parts.pop() == "[DONE]"
        choices = [json.loads(part)["choices"][0] for part in parts]
        assert choices[-1]["finish_reason"] in ("stop", "length") and len(choices) > 3
        process.wait(timeout=30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
    finally:
        process.kill()
        process.communicate()


def test_prompts_that_cannot_be_read_are_left_out(folder, tmp_path, capsys, monkeypatch):
    """Each with a line that names it; others are served."""
    shutil.copytree(folder / "story", tmp_path / "story")
    shutil.copytree(folder / "story", tmp_path / "truncated")
    file = next((tmp_path / "truncated").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "prompt.json").write_text('{"weight_map": {}}')
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README").write_text("A file is no prompt.")
    monkeypatch.setattr("spt_jax.commands.serve.DEFAULT_CONTEXT", 64)
    service = start_service(Serve(base=str(STARTER), prompts=tmp_path, slots=1, shared=64))
    service.worker.stop()
    assert service.bank.names == ["story"]
    output = capsys.readouterr().out
    assert "starter, prompts: 1, slots: 1 of 64 positions, shared: 64 positions (" in output
    lines = [line for line in output.splitlines() if "is left out: " in line]
    assert [Path(line.split()[0]).name for line in lines] == [
        ".hidden",
        "empty",
        "foreign",
        "loop",
        "lora",
        "truncated",
    ]


def test_long_prompts_that_slots_copy_are_noted(tmp_path, capsys, monkeypatch):
    base, method = spt_jax.load_base("starter"), spt_jax.PrefixTuning(length=70)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    bank = spt_jax.PromptBank(base)
    for name, verbalizers in (("story", {}), ("class", {"a": " a", "b": " b"})):
        template = spt_jax.Template(prompt="{text}", target="{label}", verbalizers=verbalizers)
        spt_jax.save_prompt(tmp_path / name, base, method, virtual, template)
        bank.load(name, tmp_path / name)

    def noted(context: int, shared: int) -> str:
        note_long_prompts(bank, context, shared)
        return capsys.readouterr().out

    count = bank.held("story").start
    assert not noted(128, 0)
    fits = f"note: 'story' takes {count} positions, but a slot has 64; raise --context or --shared\n"
    assert noted(64, 0) == noted(64, count - 1) == fits and not noted(64, count)
    monkeypatch.setattr("spt_jax.commands.serve.LONG_PROMPT", 64)
    copies = f"note: each request under 'story' copies its {count} positions to its slot; --shared {count} keeps"
    assert noted(128, 0).startswith(copies) and noted(64, 0) == fits and not noted(128, count)


def test_the_client_on_the_page(folder, capsys):
    """As it stands there, against a server."""
    (block,) = re.findall(r"```\n(import openai\n.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    process, url = start("--base", str(STARTER), "--prompts", str(folder), "--slots", "1", "--name", "starter")
    try:
        exec(compile(block.replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    finally:
        process.terminate()
        process.communicate()
    assert len(capsys.readouterr().out.split()) > 5


def test_what_it_will_not_start_with(folder, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(["serve", "--base", str(STARTER), *words]) in (1, 2)
        return capsys.readouterr().err

    assert "not a directory" in said("--prompts", str(tmp_path / "none"))
    assert "must be more than 0" in said("--slots", "0")
    assert "must be more than 0" in said("--queue", "-1")
    missing = "--base", str(tmp_path / "none")  # what does not depend on the base is checked before it is read
    assert "chunk is 3; it must be at least 16" in said(*missing, "--chunk", "3")
    assert "lookup is 99; it must be between 0 and 32" in said(*missing, "--lookup", "99")
    assert "shared is 12; it must be at least 64" in said(*missing, "--shared", "12")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "prompt.json").write_text("{")
    assert "'broken'" in said("--prompts", str(tmp_path), "--slots", "1", "--port", "0", "--strict")
    for name in ("http://example.com", "example.com:80", "a/b", ""):
        assert "without a scheme, port or path" in said("--port", "0", "--allowed-hosts", name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in said("--port", port)
