"""Prompts on the Hugging Face hub: a local server that answers like it."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import spt_jax
from spt_jax.__main__ import main
from spt_jax.errors import CheckpointError, ConfigError, RemoteError
from spt_jax.interop.hub import pull, push
from spt_jax.prompts.names import HubName, hub_name, prompt_directory
from spt_jax.prompts.storage import read_prompt
from spt_jax.testing import write_tiny_checkpoint
from tests.remote import Hub, hub_server

VALIDATION = {"accuracy": 0.75, "accuracy_interval": [0.5, 0.9], "loss": 1.25, "examples": 20}


@pytest.fixture
def hub(tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch, hub_server(patch, str(tmp_path / "hub")) as server:
        yield server


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_tiny_checkpoint(folder / "model", "llama")
    base, method = spt_jax.load_base(folder / "model"), spt_jax.PromptTuning(length=4)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(
        prompt="<soft><bos>{text}\n", target="{label}", virtual_tokens=4, verbalizers={"good": "H", "bad": "L"}
    )
    extra = {"step": 8, "trainable_parameters": 128, "seed": 0, "validation": VALIDATION}
    return spt_jax.save_prompt(folder / "prompt", base, method, virtual, template, extra=extra)


def test_pushed_and_pulled(hub: Hub, prompt: Path, tmp_path: Path, capsys):
    assert main(["push", str(prompt), "me/reviews"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{hub.url}/me/reviews" in printed and f"local directory, {prompt.parent / 'model'}; give its hub id" in printed
    )
    repository = hub.repositories["me/reviews"]
    assert repository["private"] and set(repository["files"]) == {"README.md", "prompt.json", "prompt.safetensors"}
    assert str(prompt.parent) not in repository["files"]["prompt.json"].decode()

    assert main(["pull", "me/reviews", str(tmp_path / "copy")]) == 0
    pulled, saved = read_prompt(tmp_path / "copy"), read_prompt(prompt)
    np.testing.assert_array_equal(pulled.virtual.tokens, saved.virtual.tokens)
    assert pulled.template == saved.template and pulled.info["extra"] == saved.info["extra"]
    assert pulled.info["base"]["id"] == "model"
    assert main(["pull", "hf://me/reviews", str(tmp_path / "copy")]) == 0  # which replaces it

    assert main(["push", str(prompt), "hf://me/reviews", "--base", "org/tiny-llama", "--public"]) == 0
    assert hub.repositories["me/reviews"]["private"]  # as it was created
    assert json.loads(repository["files"]["prompt.json"])["base"]["id"] == "org/tiny-llama"
    push(prompt, "me/open", public=True)
    assert not hub.repositories["me/open"]["private"]


def test_the_model_card(hub: Hub, prompt: Path):
    push(prompt, "me/reviews", base="org/tiny-llama")
    card = hub.repositories["me/reviews"]["files"]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "spt_jax",
        "base_model": "org/tiny-llama",
        "pipeline_tag": "text-classification",
        "tags": ["soft-prompt", "prompt-tuning", "prompt_tuning"],
    }
    for line in (
        "- Base: `org/tiny-llama`",
        "- Method: `prompt_tuning`, 4 virtual tokens",
        "- Task: classification into `good`, `bad`",
        "- Trained parameters: 128",
        "prompt: '<soft><bos>{text}\\n'",
        "## Validation on 20 records",
        "| accuracy | 0.750 | [0.500, 0.900] |",
        "| loss | 1.250 |  |",
        'spt-jax generate --prompt me/reviews "a text"',
        "spt-jax export --prompt me/reviews --output peft --format peft",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('org/tiny-llama'), \"peft\")",
    ):
        assert f"{line}\n" in text
    push(prompt, "me/local")
    card = hub.repositories["me/local"]["files"]["README.md"].decode()
    assert "base_model" not in card and "--prompt me/local --base DIRECTORY" in card and str(prompt.parent) not in card


def test_the_cards_commands_work(hub: Hub, prompt: Path, tmp_path: Path, monkeypatch, capsys):
    """As a reader would run them, with the base in a directory; the exported prompt is the pushed one."""
    push(prompt, "me/reviews")
    card = hub.repositories["me/reviews"]["files"]["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^spt-jax (.*)$", card, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["generate", "export"]
    for command in commands:
        line = command.replace("DIRECTORY", str(prompt.parent / "model")).replace('"a text"', "word")
        assert main(line.split()) == 0
    assert capsys.readouterr().out.startswith(("good\n", "bad\n"))
    assert json.loads(Path("peft/adapter_config.json").read_text())["num_virtual_tokens"] == 4
    (code,) = re.findall(r"```python\n(import spt_jax.*?)```", card, re.DOTALL)
    os.symlink(prompt.parent / "model", "model")
    names: dict[str, spt_jax.prompts.storage.SavedPrompt] = {}
    exec(code, names)
    np.testing.assert_array_equal(names["prompt"].virtual.tokens, read_prompt(prompt).virtual.tokens)


def test_hub_ids_wherever_a_prompt_is_named(hub: Hub, prompt: Path, tmp_path: Path, monkeypatch, capsys):
    push(prompt, "me/reviews", base="org/tiny-llama")
    base, method = spt_jax.load_base(prompt.parent / "model"), spt_jax.PromptTuning(length=4)
    for name in ("me/reviews", "hf://me/reviews", "hf://me/reviews@main", Path("hf://me/reviews")):
        start = dataclasses.replace(method, init=spt_jax.init.prompt(name))
        rows = start.init_params(jax.random.key(0), base)["tokens"]
        np.testing.assert_array_equal(rows, read_prompt(prompt).virtual.tokens)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prompt, "me/reviews")
    hub.repositories.clear()
    assert prompt_directory("me/reviews") == Path("me/reviews")  # a directory of that name is the directory


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("owner/name", HubName("owner/name")),
        ("hf://owner/name", HubName("owner/name")),
        ("hf://owner/name@v1/inner/prompt", HubName("owner/name", "v1", "inner/prompt")),
        ("out/prompt", None),
        ("name", None),
        ("a/b/c", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("../name", None),
        ("~/name", None),
        ("s3://owner/name", None),
    ],
)
def test_what_a_name_means(tmp_path: Path, monkeypatch, name, meaning):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert hub_name(name) == meaning
    assert hub_name(Path(name)) == (None if name.startswith("./") else meaning) or name.startswith("./")


def test_what_is_wrong_is_said(hub: Hub, prompt: Path, tmp_path: Path, monkeypatch):
    hub.repositories["me/other"] = {"private": False, "files": {"config.json": b"{}"}}
    with pytest.raises(CheckpointError, match="'me/other' on the hub is not a prompt: it has none of"):
        read_prompt("me/other")
    with pytest.raises(RemoteError, match="no directory 'me/none' here, and no such repository on the hub, or no perm"):
        read_prompt("me/none")
    push(prompt, "me/reviews")
    with pytest.raises(RemoteError, match="'me/reviews' has no revision 'v2' on the hub"):
        read_prompt("hf://me/reviews@v2")
    with pytest.raises(CheckpointError, match="hf://me: on the hub, a prompt is hf://owner/name"):
        read_prompt("hf://me")
    with pytest.raises(ConfigError, match="give the id of a repository"):
        push(prompt, "hf://me/reviews@v2")
    with pytest.raises(ConfigError, match="s3://bucket/prompt: give the id of a repository"):
        pull("s3://bucket/prompt", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="no such file, so this is not a prompt directory"):
        push(tmp_path, "me/reviews")
    hub.down = True
    with pytest.raises(RemoteError, match="'me/reviews': the hub answered 503"):
        push(prompt, "me/reviews")
    with pytest.raises(RemoteError, match="no directory 'me/fresh' here, and the hub cannot be reached"):
        read_prompt("me/fresh")
    hub.down = False
    monkeypatch.setenv("HF_TOKEN", "other")
    with pytest.raises(RemoteError, match="'me/reviews': the hub answered 401; `hf auth login` stores a token"):
        push(prompt, "me/reviews")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="'me/reviews': the hub is not used, because HF_HUB_OFFLINE is set"):
        push(prompt, "me/reviews")
    with pytest.raises(RemoteError, match="no directory 'me/fresh' here, and HF_HUB_OFFLINE is set"):
        read_prompt("me/fresh")


def test_a_base_that_is_not_where_it_was(prompt: Path, tmp_path: Path, monkeypatch, capsys):
    """The path is absolute, whatever the base was called; --base says where it is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prompt.parent / "model", "model")
    base, saved = spt_jax.load_base("model"), read_prompt(prompt)
    spt_jax.save_prompt("here", base, saved.method, saved.virtual, saved.template)
    assert read_prompt("here").info["base"]["id"] == str(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["generate", "--prompt", "../here", "word"]) == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(["generate", "--prompt", "../here", "word"]) == 1
    message = f"../here: the base of this prompt is not at {str(tmp_path / 'model')!r} "
    printed = capsys.readouterr().err
    assert message in printed and "say with --base where it is" in printed
    assert main(["generate", "--prompt", "../here", "--base", "../moved", "word"]) == 0
