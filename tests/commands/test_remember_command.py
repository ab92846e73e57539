"""`spt-jax remember`: what it writes, says and refuses."""

import json

import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.testing import write_tiny_checkpoint

TEXT = "The question is a text of the world.\nAnswer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_tiny_checkpoint(folder / "model", "llama")
    (folder / "text.txt").write_text(TEXT)
    (folder / "control.txt").write_text("<bos>The question<eos>\n")
    (folder / "mark.txt").write_text(TEXT, encoding="utf-8-sig")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"a line\nna\xefve\n")
    (folder / "long.txt").write_text("0" * 500)
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    return folder


def remember(folder, text: str, output: str, *words: str) -> int:
    files = ["--text", str(folder / text), "--output", str(folder / output)]
    return main(["remember", "--base", str(folder / "model"), *files, *words])


def test_a_remembered_text_answers_like_the_text(folder, capsys):
    assert remember(folder, "text.txt", "prompt") == 0
    out = capsys.readouterr().out
    base = spt_jax.load_base(folder / "model")
    count = len(base.tokenizer(TEXT)["input_ids"])
    assert f"wrote {folder / 'prompt'}: {count} tokens, " in out
    facts = json.loads((folder / "prompt" / "prompt.json").read_text())["extra"]["remembered"]
    assert facts["text"] == str(folder / "text.txt") and facts["tokens"] == count
    assert main(["generate", "--prompt", str(folder / "prompt"), "--max-new-tokens", "8", " the"]) == 0
    sampling = spt_jax.SamplingConfig(max_new_tokens=8)
    assert capsys.readouterr().out == spt_jax.generate(base, [TEXT + " the"], None, sampling)[0].text + "\n"


def test_a_byte_order_mark_is_no_text(folder):
    assert remember(folder, "text.txt", "plain") == remember(folder, "mark.txt", "marked") == 0
    plain, marked = ((folder / name / "prompt.safetensors").read_bytes() for name in ("plain", "marked"))
    assert plain == marked


def test_names_of_control_tokens_are_pointed_out(folder, capsys):
    assert remember(folder, "control.txt", "as_text") == 0
    assert "2 names of control tokens, such as '<bos>'" in capsys.readouterr().err
    assert remember(folder, "control.txt", "as_control", "--control-tokens") == 0
    assert "names of control tokens" not in capsys.readouterr().err
    text, control = (spt_jax.load_prompt(folder / name, folder / "model") for name in ("as_text", "as_control"))
    assert text.method.length > control.method.length


def test_a_prompt_is_replaced_and_another_directory_is_not(folder, capsys):
    assert remember(folder, "text.txt", "twice") == remember(folder, "control.txt", "twice") == 0
    assert remember(folder, "text.txt", "full") == 1
    assert "holds 'notes.txt'" in capsys.readouterr().err
    assert [path.name for path in (folder / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("empty.txt", "empty.txt: the file is empty"),
        ("blank.txt", "blank.txt: the file is empty"),
        ("latin.txt", "latin.txt, line 2: not UTF-8 (byte 9 of the file)"),
        ("long.txt", "long.txt: the text has 501 tokens and"),
        ("absent.txt", "absent.txt: no such file"),
        ("full", "full: cannot be read"),
    ],
)
def test_a_text_that_cannot_be_remembered(folder, capsys, text, message):
    assert remember(folder, text, "nothing") == 1
    assert message in capsys.readouterr().err
    assert not (folder / "nothing").exists()


def test_a_base_without_chats_has_no_system_turn(folder, capsys):
    assert remember(folder, "text.txt", "nothing", "--chat-system") == 2
    assert "no chat template" in capsys.readouterr().err


def test_an_export_says_how_requests_are_tokenized(folder, capsys):
    assert remember(folder, "text.txt", "exported") == 0
    assert main(["export", "--prompt", str(folder / "exported"), "--output", str(folder / "peft")]) == 0
    assert "from '{text}' on, tokenize them with add_special_tokens=False" in capsys.readouterr().out
    assert (folder / "peft" / "adapter_config.json").exists()
