"""Prompts come and go while others are answered, from one directory alone, with the key alone."""

import json
import shutil
import time

import httpx
import jax
import pytest

from spt_jax.testing import tiny_base
from tests.serving.conftest import ADMIN, KEY, alone, save


def test_prompts_change_while_others_are_answered(server, base, folder, client):
    """A stream goes on, nothing is compiled for a prompt like others, and the new prompt answers as its own."""
    compiled = []

    def listen(name, _, **details):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name"))

    options = {"model": "front", "prompt": "the", "max_tokens": 60, "temperature": 0}
    expected = alone(server, "front", "the", max_new_tokens=60)[1].text
    # Compiles what the first prompt of a kind, and answers of this length, need.
    save(folder / "passing", base, "front", seed=2)
    assert server.post("/v1/prompts", {"name": "passing"}, headers=ADMIN).status_code == 201
    for model in ("front", "end", "passing"):
        server.post("/v1/completions", {**options, "model": model})
    shutil.rmtree(folder / "passing")
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
    for given in (None, "Bearer open sesam", "Bearer \xfc", KEY[1:], KEY, f"Basic {KEY}"):
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
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "inner" / name).unlink()
    (folder / "inner" / name).symlink_to(folder / "inner" / name)
    for own in ("loop", "inner"):
        assert server.post("/v1/prompts", {"name": own}, headers=ADMIN).status_code in (400, 404)
    (folder / "loop").unlink()
    (folder / "link").unlink()
    shutil.rmtree(folder / "inner")


def test_prompts_that_are_no_good(server, base, folder):
    """They are refused with what is wrong, and a prompt that was there before goes on."""

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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: [], ""),
        (lambda info: {"weight_map": {}}, ""),
        (lambda info: {**info, "template": None}, ""),
        (lambda info: {**info, "base": 3}, ""),
        (lambda info: {**info, "template": {**info["template"], "prompt": "<soft>{text}\ud800"}}, "surrogate"),
        (lambda info: {**info, "template": {**info["template"], "prompt": "<soft>" + "word " * 200 + "{text}"}}, "128"),
    ],
)
def test_other_json_is_refused(server, base, folder, change, said):
    save(folder / "other", base, "front")
    file = folder / "other" / "prompt.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    response = server.post("/v1/prompts", {"name": "other"}, headers=ADMIN)
    assert response.status_code == 400 and said in response.json()["error"]["message"]
    assert "other" not in server.service.bank.names
    shutil.rmtree(folder / "other")


def test_a_lora_is_refused(server, folder):
    (folder / "lora").mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "r": 8}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    response = server.post("/v1/prompts", {"name": "lora"}, headers=ADMIN)
    assert response.status_code == 400 and "LORA" in response.json()["error"]["message"]
    shutil.rmtree(folder / "lora")
