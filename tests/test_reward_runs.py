"""Runs with reward functions, end to end on a tiny model: what is reported, resuming, failures and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import spt_jax
import train
from spt_jax.__main__ import main
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training import single
from tests.jobs import ROOT, arrays, history, stopped_at_batch

LAST = 6
MODULE = """
import pathlib

def vowels(completions, prompts, text, **_):
    if pathlib.Path("broken").exists():
        raise OSError("the judge is not reachable")
    assert all(own in prompt for own, prompt in zip(text, prompts))
    return [sum(letter in "aeiou" for letter in answer) / 8 for answer in completions]

def short(completions, **_):
    return [1.0 if len(answer) < 6 else 0.0 for answer in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    write_tiny_checkpoint(folder / "model", "llama")
    (folder / "tiny_rewards.py").write_text(MODULE)
    records = [{"text": f"{word} {number}"} for number, word in enumerate(["the", "a", "was", "is"] * 3)]
    for split, own in (("train", records[:6]), ("validation", records[6:9]), ("test", records[9:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def words(folder: Path, workdir: Path, *more: str) -> list[str]:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", str(folder / "model")]
    for split in ("train", "validation", "test"):
        line += [f"--data.{split}", str(folder / f"{split}.jsonl")]
    line += ["--task.name", "rewards", "--task.reward", "tiny_rewards:vowels", "tiny_rewards:short"]
    line += ["--task.reward-weights", "1", "0.5", "--data.prompt", "<soft>{text}: ", "--method.length", "3"]
    line += ["--train.steps", str(LAST), "--train.evaluate-every", "4", "--train.batch-size", "2"]
    line += ["--loss.over", "grpo", "--loss.group-size", "3", "--loss.max-new-tokens", "8", "--loss.updates", "2"]
    return [*line, *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train.main(words(folder, workdir)) == 0
    finally:
        os.chdir(before)
    return workdir


def test_results_metrics_and_the_prompt(folder, finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    soft, bare = (results["test"][name] for name in ("soft_prompt", "no_prompt"))
    for own in (soft, bare):
        low, high = own["reward_interval"]
        assert low <= own["reward"] <= high and own["examples"] == 3 and own["loss"] == -own["reward"]
        np.testing.assert_allclose(own["reward"], own["reward/vowels"] + 0.5 * own["reward/short"])
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    assert len(steps) == LAST
    for line in steps:
        np.testing.assert_allclose(line["reward"], line["reward/vowels"] + 0.5 * line["reward/short"])
        assert line["kl"] > 0 and 0 <= line["clip_share"] <= 1 and line["reward_failures"] == 0
        assert 0 <= line["groups_with_spread"] <= 1 and 1 <= line["completion_length"] <= 8
    rewards = [line["reward"] for line in steps]
    assert rewards[::2] == rewards[1::2] and len(set(rewards)) > 1  # two updates with each rollout
    again = tmp_path / "again.json"
    line = ["evaluate", "--prompt", str(finished / "prompt"), "--data", str(folder / "test.jsonl")]
    line += ["--output", str(again), "--max-new-tokens", "8"]
    assert main([*line, "--reward", "tiny_rewards:vowels"]) == 0
    assert f'"reward": {soft["reward/vowels"]}' in json.dumps(json.loads(again.read_text()))
    assert main(line) == 2
    assert main(["generate", "--prompt", str(finished / "prompt"), "the 3", "--max-new-tokens", "3"]) == 0


def test_a_stopped_run_resumes_bit_for_bit_in_the_middle_of_a_rollout(folder, finished, tmp_path):
    workdir = tmp_path / "stopped"
    with stopped_at_batch(3):
        assert train.main(words(folder, workdir)) == 143
    assert train.main(words(folder, workdir, "--resume")) == 0
    assert history(workdir) == history(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()


def test_a_run_whose_reward_function_fails_is_saved_and_resumes(folder, finished, tmp_path, monkeypatch, capsys):
    place, calls, broken = single.place_batch, [], folder / "broken"

    def place_and_break(batch, mesh):
        calls.append(1)
        if len(calls) == 2:
            broken.touch()
        return place(batch, mesh)

    workdir = tmp_path / "failed"
    monkeypatch.setattr(single, "place_batch", place_and_break)
    try:
        assert train.main(words(folder, workdir)) == 1
    finally:
        broken.unlink()
    message = capsys.readouterr().err
    assert "reward 'vowels' failed for sample 1" in message and "OSError: the judge is not reachable" in message
    assert "failed for 6 of 6 answers" in message
    monkeypatch.setattr(single, "place_batch", place)
    assert train.main(words(folder, workdir, "--resume")) == 0
    assert history(workdir) == history(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()


def short_answers(completions, **_):
    return [1.0 if len(answer) < 6 else 0.0 for answer in completions]


def test_fit_takes_functions(folder, finished):
    """And it is the run of the command line."""
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    base = spt_jax.load_base(str(folder / "model"), dtype="float32")
    template = spt_jax.Template(prompt="<soft>{text}: ", head="rewards")
    options = {"objective": spt_jax.Grpo(group_size=3, max_new_tokens=8), "batch_size": 2, "progress": False}

    def fitted(rewards):
        return spt_jax.fit(
            base, spt_jax.PromptTuning(length=3), template, records, steps=1, rewards=rewards, **options
        ).history

    (line,) = fitted([short_answers])
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(line["reward"], first["reward/short"], rtol=1e-6)
    with pytest.raises(spt_jax.ConfigError, match=r"task.name=rewards and task.reward need each other"):
        fitted([])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--task.reward"], "task.reward_weights is given without task.reward"),
        (["--task.reward", "tiny_rewards:vowel", "x"], "tiny_rewards has no function 'vowel'"),
        (["--task.reward", "label", "tiny_rewards:short"], "train.jsonl: record 1 has no field 'label'"),
        (["--data.target", "x"], "data.target is 'x', but with task.name=rewards the answers are sampled"),
        (["--task.name", "language_model", "--data.target", "x"], "task.name=rewards and loss.over=grpo need each"),
        (["--loss.over", "vocabulary"], "task.name=rewards and loss.over=grpo need each other"),
        (["--task.reward-failures", "1.5"], "task.reward_failures is 1.5"),
    ],
)
def test_mistakes_end_the_run_before_it_starts(folder, tmp_path, capsys, more, problem):
    line = words(folder, tmp_path / "run", *more)
    if "vocabulary" in more:
        line = line[: line.index("--loss.over")] + more
    try:
        code = train.main(line)
    except SystemExit as error:  # of the parser of the command line
        code = error.code
    assert code in (1, 2) and not (tmp_path / "run").exists()
    assert problem in " ".join(capsys.readouterr().err.split())
