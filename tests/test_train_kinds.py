"""Runs of the main job that are not one classifier's: tags, answers within a text, several tasks at once."""

import json

import numpy as np
import pytest

import train
from spt_jax.__main__ import main
from spt_jax.prompts.storage import read_prompt
from spt_jax.testing import write_tiny_checkpoint
from tests.test_train import ROOT

FILLER, NAMES = ["the", "a", "was", "is"], ["Ann", "Bob", "Eve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, and sentences with a name in them, which the tags and the answer point at."""
    folder = tmp_path_factory.mktemp("kinds")
    write_tiny_checkpoint(folder / "model", "llama")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 20), ("test", 30)):
        lines = []
        for number in range(count):
            words = [str(rng.choice(FILLER)) for _ in range(rng.integers(3, 7))]
            place = int(rng.integers(len(words)))
            words[place] = str(rng.choice(NAMES))
            tags = ["B-name" if word in NAMES else "O" for word in words]
            record = {"words": words, "tags": tags, "text": " ".join(words), "answer": words[place]}
            lines.append({**record, "task": "xy"[number % 2], "label": "yx"[number % 2]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(folder, workdir, *more: str) -> dict:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", str(folder / "model")]
    for split in ("train", "validation", "test"):
        line += [f"--data.{split}", str(folder / f"{split}.jsonl")]
    assert train.main([*line, "--train.batch-size", "8", *more]) == 0
    return json.loads((workdir / "results.json").read_text())


HEAD = ("--method.name", "deep_prompts", "--method.length", "4")


def test_tags(folder, tmp_path, capsys):
    data = ("--data.prompt", "{words}", "--data.target", "{tags}", "--data.reads", "words")
    results = run(folder, tmp_path / "run", *data, *HEAD, "--method.head", "tagging", "--train.steps", "60")
    soft = results["test"]["soft_prompt"]
    assert results["test"]["no_prompt"] is None
    assert soft["accuracy"] > 0.95 and soft["entity_f1"] > 0.9 and soft["words"] > 90
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    right = [a == b for p in predictions for a, b in zip(p["label"], p["prediction"], strict=True)]
    assert np.mean(right) == pytest.approx(soft["accuracy"])
    capsys.readouterr()
    prompt = ["--prompt", str(tmp_path / "run" / "prompt")]
    assert main(["generate", *prompt, "the Bob was"]) == 0
    assert capsys.readouterr().out == "O B-name O\n"
    output = tmp_path / "again.json"
    assert main(["evaluate", *prompt, "--data", str(folder / "test.jsonl"), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["soft_prompt"]["accuracy"] == soft["accuracy"]


def test_answers_in_a_text(folder, tmp_path, capsys):
    data = ("--data.prompt", r"Who?\n{text}", "--data.target", "{answer}", "--data.reads", "text")
    results = run(folder, tmp_path / "run", *data, *HEAD, "--method.head", "span", "--train.steps", "60")
    assert results["test"]["soft_prompt"]["exact_match"] > 0.9
    capsys.readouterr()
    assert main(["generate", "--prompt", str(tmp_path / "run" / "prompt"), "a the Eve is", "Bob was"]) == 0
    assert capsys.readouterr().out == "Eve\nBob\n"
    assert main(["generate", "--prompt", str(tmp_path / "run" / "prompt"), " "]) == 1
    assert "the field 'text' is empty" in capsys.readouterr().err


def test_tasks_that_only_their_own_prompts_tell_apart(folder, tmp_path, capsys):
    """The label depends on the task alone, which the text does not show."""
    data = ("--data.prompt", r"<soft:4>{text}\n", "--data.target", "{label}", "--data.verbalizers", "x=H", "y=L")
    tasks = ("--data.task", "task", "--method.name", "multitask_prompt_tuning", "--train.steps", "60")
    results = run(folder, tmp_path / "run", *data, *tasks)
    by_task = results["test"]["soft_prompt"]["tasks"]
    assert results["test"]["soft_prompt"]["accuracy"] == 1
    assert by_task == {name: {"accuracy": 1, "examples": 15} for name in "xy"}
    assert "  x " in capsys.readouterr().out
    only_x = tmp_path / "x.jsonl"
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    only_x.write_text("".join(json.dumps(r) + "\n" for r in records if r["task"] == "x"))
    for name, expected in (("x", 1), ("y", 0)):
        output = tmp_path / f"{name}.json"
        line = ["evaluate", "--prompt", str(tmp_path / "run" / "prompt" / name), "--data", str(only_x)]
        assert main([*line, "--output", str(output)]) == 0
        assert json.loads(output.read_text())["soft_prompt"]["accuracy"] == expected

    shared = read_prompt(tmp_path / "run" / "prompt" / "shared")
    assert shared.method.name == "prompt_tuning" and shared.template.task is None
    start = ("--method.init.name", "prompt", "--method.init.path", str(tmp_path / "run" / "prompt" / "shared"))
    adapted = run(folder, tmp_path / "new", *data[:2], *data[2:], *start, "--train.steps", "2")
    assert adapted["steps"] == 2


@pytest.mark.parametrize(
    ("family", "note"),
    [("mistral", "note: 3 of 3 layers see only the last 7"), ("t5gemma", "note: 3 of 5 layers see only the nearest 7")],
)
def test_a_prompt_that_slides_out_of_the_window_is_spoken_of(folder, tmp_path, capsys, family, note):
    write_tiny_checkpoint(tmp_path / "model", family)  # a window of 7
    line = [str(ROOT / "configs" / "local_files.py"), "--base.path", str(tmp_path / "model"), "--dry-run"]
    line += ["--data.train", str(folder / "train.jsonl"), "--data.target", "{label}"]
    assert train.main([*line, "--data.prompt", "<soft:4>{text}"]) == 0
    assert f"{note} tokens" in capsys.readouterr().out
    assert train.main([*line, "--data.prompt", "<soft:2>{task}"]) == 0
    assert "layers see only" not in capsys.readouterr().out


def test_a_context_of_solved_examples(folder, tmp_path, capsys):
    data = (
        "--data.target",
        "{label}",
        "--data.verbalizers",
        "x=H",
        "y=L",
        "--method.name",
        "cpt",
        "--train.steps",
        "2",
    )
    context = ("--method.context", r"the Bob\n[[H]]\na Eve\n[[L]]\n")
    results = run(folder, tmp_path / "run", "--data.prompt", r"<soft>{text}\n", *data, *context)
    saved = read_prompt(tmp_path / "run" / "prompt")
    assert results["steps"] == 2 and saved.method.length == len(saved.method.ids) == len(saved.virtual.tokens)
    assert len(saved.method.auxiliary().ids) == 2
    with pytest.raises(AssertionError):
        run(folder, tmp_path / "two", "--data.prompt", r"{text}<soft>\n", *data, *context)
    assert "must come first in data.prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--data.task", "task"), 2, "need each other"),
        (("--method.name", "multitask_prompt_tuning"), 2, "need each other"),
        (("--data.task", "tusk", "--method.name", "multitask_prompt_tuning"), 1, "'tusk'; did you mean 'task'"),
        (("--data.task", "answer", "--method.name", "multitask_prompt_tuning", "--method.tasks", "Ann", "Bo"), 1,
         "no prompt for the task 'Bob'; did you mean 'Bo'"),
        (("--data.task", "text", "--method.name", "multitask_prompt_tuning", "--method.tasks", "a/b"), 2, "'a/b'"),
        ((*HEAD, "--method.head", "span", "--data.reads", "text", "--data.hard-prompt", "{text}"), 2, "a span head"),
        ((*HEAD, "--method.head", "tagging", "--data.reads", "txt"), 2, "did you mean 'text'"),
        ((*HEAD, "--method.head", "tagging", "--data.reads", "text", "--loss.over", "verbalizers"), 2, "tagging head"),
        ((*HEAD, "--method.head", "span", "--data.reads", "text", "--method.classes", "3"), 2, "method.classes=3"),
    ],
)  # fmt: skip
def test_wrong_words(folder, tmp_path, capsys, more, code, message):
    prompt = "{text}" if HEAD[1] in more else "<soft:4>{text}"
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(tmp_path / "run")]
    line += ["--base.path", str(folder / "model"), "--data.train", str(folder / "train.jsonl")]
    line += ["--data.prompt", prompt, "--data.target", "{label}", *more]
    try:
        result = train.main(line)
    except SystemExit as stop:  # what a dataclass refuses while the command line is read
        result = stop.code
    assert result == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
