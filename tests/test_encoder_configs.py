"""The configs for encoders and encoder-decoders run on the user's files, here with tiny models."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import train
from spt_jax.experiment.config import make_template, resolve
from spt_jax.experiment.config_files import load_config_file
from spt_jax.testing import write_tiny_checkpoint
from tests.jobs import ROOT

FINANCE, TASKS, MRPC, CONLL, SQUAD = (
    ROOT / "configs" / f"{name}.py"
    for name in (
        "finance_t5_large", "sst2_mnli_flan_t5_base", "mrpc_roberta_large", "conll2003_roberta_large",
        "squad_modernbert_base",
    )
)  # fmt: skip


def run(config: Path, folder: Path, family: str, records: list[dict], *words: str) -> dict:
    """The results of a short run on these records."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records * 8))
    base = write_tiny_checkpoint(folder / "base", family)
    sets = [word for name in ("train", "validation", "test") for word in (f"--data.{name}", str(data))]
    line = [str(config), "--workdir", str(folder / "run"), "--base.path", str(base), "--train.steps", "4"]
    assert train.main([*line, "--train.evaluate-every", "4", *sets, *words]) == 0
    return json.loads((folder / "run" / "results.json").read_text())


def test_finance(tmp_path):
    records = [{"sentence": f"a {word} year", "label": word} for word in ("negative", "neutral", "positive")]
    results = run(FINANCE, tmp_path, "t5", records)
    assert set(results["test"]) == {"soft_prompt", "hard_prompt", "no_prompt"}
    assert results["test"]["soft_prompt"]["examples"] == 24
    assert load_file(tmp_path / "run" / "prompt" / "prompt.safetensors")["tokens"].shape[0] == 20


def test_two_tasks(tmp_path):
    records = [
        {"task": "sst2", "input": "good", "output": "positive"},
        {"task": "mnli", "input": "a question the answer", "output": "neutral"},
    ]
    run(TASKS, tmp_path, "t5", records, "--evaluation.max-new-tokens", "4")
    for name in ("sst2", "mnli", "shared"):
        assert load_file(tmp_path / "run" / "prompt" / name / "prompt.safetensors")["tokens"].shape[0] == 50


@pytest.mark.parametrize(
    "words", [(), ("--method.name", "p_tuning", "--method.length", "20")], ids=["prompt", "p-tuning"]
)
def test_mrpc(words, tmp_path):
    """The tiny tokenizer has other words of one token."""
    records = [{"sentence1": "a b", "sentence2": "b a", "label": 1}, {"sentence1": "a", "sentence2": "c", "label": 0}]
    results = run(MRPC, tmp_path, "roberta", records, "--data.verbalizers", "0= the", "1= question", *words)
    assert set(results["test"]) == {"soft_prompt", "hard_prompt", "no_prompt"}
    assert results["test"]["no_prompt"] is not None


def test_mrpc_with_a_classifier(tmp_path):
    records = [{"sentence1": "a b", "sentence2": "b a", "label": 1}, {"sentence1": "a", "sentence2": "c", "label": 0}]
    words = ["--task.name", "classification", "--method.name", "deep_prompts", "--method.length", "20"]
    results = run(MRPC, tmp_path, "roberta", records, *words, "--data.prompt", "{sentence1}<eos>{sentence2}")
    assert results["test"]["no_prompt"] is None
    assert results["test"]["soft_prompt"]["examples"] == 16


def test_conll(tmp_path):
    records = [
        {"tokens": ["Ann", "was", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
        {"tokens": "the question", "tags": "O O"},
    ]
    soft = run(CONLL, tmp_path, "roberta", records)["test"]["soft_prompt"]
    assert soft["words"] == 7 * 8 and 0 <= soft["entity_f1"] <= 1
    stored = json.loads((tmp_path / "run" / "prompt" / "prompt.json").read_text())
    assert list(stored["template"]["verbalizers"]) == ["B-LOC", "B-PER", "I-LOC", "O"]


def test_squad(tmp_path):
    context = "a good text is the answer"
    answers = {"text": ["the answer"], "answer_start": [15]}
    records = [{"question": "what is it", "context": context, "answers": answers}]
    soft = run(SQUAD, tmp_path, "modernbert", records)["test"]["soft_prompt"]
    assert soft["examples"] == 8 and soft["token_f1"] >= soft["exact_match"]
    predictions = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prediction"] in context for line in predictions)


def test_the_settings_are_those_of_the_sources():
    finance = resolve(load_config_file(FINANCE))
    assert (finance.method.token_count, finance.method.init.text) == (20, "What is the sentiment of this article?\n")
    assert (finance.optimizer.name, finance.optimizer.learning_rate, finance.optimizer.schedule) == (
        "adamw",
        1.0,
        "linear",
    )
    tasks = resolve(load_config_file(TASKS))
    assert (tasks.method.token_count, tasks.train.batch_size) == (50, 8)
    mrpc = resolve(load_config_file(MRPC))
    assert (mrpc.method.token_count, mrpc.train.batch_size, mrpc.train.steps) == (10, 32, 2300)
    assert make_template(mrpc).prompt == "<soft>{sentence1}<mask>, {sentence2}"
