"""Runs on pairs of answers, end to end on a tiny model: what is reported, resuming, and the same run in a sweep."""

import json
from pathlib import Path

import numpy as np
import pytest

import spt_jax
import train
from spt_jax.__main__ import main
from spt_jax.data.encoder import encoder_for
from spt_jax.evaluation.evaluate import evaluate, make_evaluation_set
from spt_jax.prompts.storage import load_prompt
from spt_jax.testing import write_tiny_checkpoint
from tests.examples import VOCAB, sequence_logits
from tests.jobs import ROOT, arrays, history, stopped_at_batch

LAST = 12
RECORDS = [
    {"prompt": f"{word} {number}", "chosen": "good and nice", "rejected": "bad"}
    for number, word in enumerate(["the", "a", "was", "is"] * 8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_tiny_checkpoint(folder / "model", "llama")
    for split, records in (("train", RECORDS[:16]), ("validation", RECORDS[16:24]), ("test", RECORDS[24:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def words(folder: Path, workdir: Path, *more: str) -> list[str]:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", str(folder / "model")]
    for split in ("train", "validation", "test"):
        line += [f"--data.{split}", str(folder / f"{split}.jsonl")]
    line += ["--task.name", "preference", "--data.prompt", "<soft>{prompt}: ", "--method.length", "3"]
    line += ["--train.steps", str(LAST), "--train.evaluate-every", "6", "--train.batch-size", "8"]
    return [*line, "--loss.over", "dpo", "--loss.beta", "0.5", *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(words(folder, workdir)) == 0
    return workdir


def test_results_metrics_and_the_prompt(folder, finished, tmp_path, capsys):
    results = json.loads((finished / "results.json").read_text())
    soft, bare = (results["test"][name] for name in ("soft_prompt", "no_prompt"))
    assert soft["accuracy"] == 1.0 and soft["reward_margin"] > 0.5 and soft["kl_to_base"] > 0
    assert bare["win_rate"] == bare["accuracy"] == 0.0 and "kl_to_base" not in bare and "reward_margin" not in bare
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all({"accuracy", "reward_margin", "chosen_log_ratio"} <= set(line) for line in steps) and len(steps) == LAST
    # The loss of a pair is a convex function of its margin, so the mean loss is at least that of the mean margin.
    assert all(line["loss"] >= np.log1p(np.exp(-line["reward_margin"])) - 1e-6 for line in steps)
    validated = lines[-1]["validation"]
    assert {"win_rate", "accuracy", "reward_margin", "chosen_log_ratio", "kl_to_base", "loss"} <= set(validated)
    config = json.loads((finished / "config.json").read_text())
    assert config["loss"]["beta"] == 0.5 and config["data"]["rejected"] == "{rejected}"
    capsys.readouterr()
    prompt = ["--prompt", str(finished / "prompt")]
    output = tmp_path / "again.json"
    data = ["--data", str(folder / "test.jsonl"), "--output", str(output)]
    assert main(["evaluate", *prompt, *data]) == 0
    again = json.loads(output.read_text())
    assert json.dumps(again).count("win_rate") >= 1
    assert main(["generate", *prompt, "the 3", "--max-new-tokens", "3"]) == 0


def test_the_reported_distance_is_that_of_whole_distributions(folder, finished):
    """KL and log-ratio per token of chosen answers, from the logits of each sequence alone."""
    base = spt_jax.load_base(str(folder / "model"), dtype="float32")
    saved = load_prompt(finished / "prompt", base)
    encoder = encoder_for(base, saved.template)
    data = make_evaluation_set(base, encoder, RECORDS[24:27])
    found = evaluate(base, data, saved.virtual).metrics
    distances, ratios = [], []
    for example in data.examples:
        answer, logs = example.choices[0], []
        for ids in (example.ids, example.ids[example.ids < VOCAB]):
            whole = np.concatenate([ids, answer])
            logits = sequence_logits(base, saved.virtual.tokens, whole).astype(np.float64)[len(ids) - 1 : -1]
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        soft, bare = logs
        distances += [*(np.exp(soft) * (soft - bare)).sum(-1)]
        ratios += [*(soft - bare)[np.arange(len(answer)), answer]]
    np.testing.assert_allclose(found["kl_to_base"], np.mean(distances), rtol=1e-4)
    np.testing.assert_allclose(found["chosen_log_ratio"], np.mean(ratios), rtol=1e-4)


def test_a_stopped_run_resumes_bit_for_bit(folder, finished, tmp_path):
    workdir = tmp_path / "stopped"
    with stopped_at_batch(5):
        assert train.main(words(folder, workdir)) == 143
    assert train.main(words(folder, workdir, "--resume")) == 0
    assert history(workdir) == history(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()


def test_a_trial_of_a_sweep_is_the_same_run(folder, finished, tmp_path):
    line = words(folder, tmp_path / "sweep", "--seeds", "0", "1")
    assert main(["sweep", *line]) == 0
    np.testing.assert_allclose(arrays(tmp_path / "sweep" / "trials" / "001"), arrays(finished), rtol=1e-4, atol=1e-5)


def exit_code(line: list[str]) -> object:
    try:
        return train.main(line)
    except SystemExit as error:  # of the parser of the command line
        return error.code


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--task.name", "language_model", "--data.target", "x"], "loss.over=dpo compares two answers"),
        (["--data.prompt", "<soft>{question}"], "record 1 has no field 'question'"),
        (["--data.rejected", "{worse}"], "train.jsonl: record 1 has no field 'worse'"),
        (["--loss.beta", "-1"], "Dpo.beta is -1.0"),
        (["--data.rejected", "good and nice"], "train.jsonl: record 1: the chosen and the rejected answer are equal"),
    ],
)
def test_mistakes_end_the_run_before_it_starts(folder, tmp_path, capsys, more, problem):
    assert exit_code(words(folder, tmp_path / "run", *more)) in (1, 2)
    assert problem in capsys.readouterr().err
