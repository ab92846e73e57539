"""Distillation runs, end to end on a tiny model: what is reported, resuming, a sweep, and answers of the base."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import spt_jax
import train
from spt_jax.__main__ import main
from spt_jax.data.encoder import encoder_for
from spt_jax.data.remembered import text_ids
from spt_jax.data.templates import Template
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.experiment.distillation import with_answers
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import Distillation
from tests.jobs import ROOT, arrays, history, stopped_at_batch

TEXT = "the good and the nice, the bad and the sad: good\n"
LAST = 12
SPLITS = ("train", "validation")
RECORDS = [
    {"question": f"{word} {number}", "answer": "good and nice" if number % 2 else "bad"}
    for number, word in enumerate(["the", "a", "was", "is"] * 8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    write_tiny_checkpoint(folder / "model", "llama")
    (folder / "text.txt").write_text(TEXT)
    for split, records in (("train", RECORDS[:16]), ("validation", RECORDS[16:24]), ("test", RECORDS[24:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        inputs = [{"question": record["question"]} for record in records]
        (folder / f"{split}_inputs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in inputs))
    return folder


def words(folder: Path, workdir: Path, *more: str, data: str = "", splits: Sequence[str] = SPLITS) -> list[str]:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", str(folder / "model")]
    for split in splits:
        line += [f"--data.{split}", str(folder / f"{split}{data}.jsonl")]
    line += ["--data.prompt", "<soft>{question}: ", "--data.target", "{answer}", "--method.length", "3"]
    line += ["--train.steps", str(LAST), "--train.evaluate-every", "6", "--train.batch-size", "8"]
    line += ["--evaluation.generate", "2", "--evaluation.max-new-tokens", "3"]
    return [*line, "--loss.over", "distillation", "--loss.text", str(folder / "text.txt"), "--loss.top-k", "9", *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(words(folder, workdir)) == 0
    return workdir


def test_results_compare_the_prompt_the_base_and_the_text(folder, finished):
    results = json.loads((finished / "results.json").read_text())
    soft, bare, text = (results["validation"][name] for name in ("soft_prompt", "no_prompt", "with_text"))
    assert 0 < soft["kl_to_text"] < bare["kl_to_text"] and 0 <= bare["agreement"] <= soft["agreement"] <= 1
    assert "kl_to_text" not in text and text["examples"] == soft["examples"] == 8
    base = spt_jax.load_base(str(folder / "model"), dtype="float32")
    config, ids = base.config, text_ids(base, TEXT)
    per_token = config.layers * config.kv_heads * config.head_size * 2 * 4
    seconds = results["distillation"].pop("first_token_seconds")
    assert seconds.keys() == {"with_text", "soft_prompt", "no_prompt"} and min(seconds.values()) > 0
    report = (finished / "report.html").read_text()
    assert "Distillation of the text" in report and f"{results['distillation']['text_bytes']:,}" in report
    assert results["distillation"] == {
        "text_tokens": len(ids),
        "prompt_tokens": 3,
        "text_bytes": len(ids) * per_token,
        "prompt_bytes": 3 * per_token,
    }
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    validated = [line["validation"]["kl_to_text"] for line in lines if "validation" in line]
    assert min(validated) == results["validation"]["soft_prompt"]["kl_to_text"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == LAST and losses[-1] < losses[0] and min(losses) > 0


def test_a_stopped_run_resumes_bit_for_bit(folder, finished, tmp_path):
    workdir = tmp_path / "stopped"
    with stopped_at_batch(5):
        assert train.main(words(folder, workdir)) == 143
    assert train.main(words(folder, workdir, "--resume")) == 0
    assert history(workdir) == history(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()


def test_a_trial_of_a_sweep_is_the_same_run(folder, finished, tmp_path):
    assert main(["sweep", *words(folder, tmp_path / "sweep", "--seeds", "0", "1")]) == 0
    np.testing.assert_allclose(arrays(tmp_path / "sweep" / "trials" / "001"), arrays(finished), rtol=1e-4, atol=1e-5)


def test_records_without_targets_get_the_answers_of_the_base_after_the_text(folder, tmp_path):
    base = spt_jax.load_base(str(folder / "model"), dtype="float32")
    template = Template(prompt="<soft>{question}: ", target="{answer}", virtual_tokens=3)
    encoder, text = encoder_for(base, template), text_ids(base, TEXT)
    objective = Distillation(text="unused", answer_tokens=4)
    records = [{"question": "the 3"}, {"question": "a", "answer": "kept"}, {"question": "was 5 7"}]
    found = with_answers(base, encoder, objective, text, records, batch_size=8)
    assert found[1] == records[1]
    for record, answered in ((records[0], found[0]), (records[2], found[2])):
        prompt = ids_after_text(base, text, encoder.prompt_ids(record))
        alone = generate(base, [prompt], None, SamplingConfig(max_new_tokens=4, end_ids=encoder.end_ids))[0]
        assert answered == {**record, "answer": alone.text.strip()} and answered["answer"]
    workdir = tmp_path / "run"
    more = ["--loss.answer-tokens", "3", "--train.steps", "2", "--train.evaluate-every", "2"]
    assert train.main(words(folder, workdir, *more, data="_inputs", splits=("train", "test"))) == 0
    results = json.loads((workdir / "results.json").read_text())
    # The base after the text is the author of the references.
    assert results["test"]["with_text"]["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("more", "data", "problem"),
    [
        ([], "_inputs", "record 1 has no field 'answer'"),
        (["--data.prompt", "<soft>{input}: "], "", "record 1 has no field 'input'"),
        (["--loss.answer-tokens", "4", "--data.target", "{answer} {more}"], "_inputs", "exactly one field"),
        (["--loss.top-k", "400"], "", "loss.top_k is 400, and the vocabulary"),
        (["--loss.text", "missing.txt"], "", "missing.txt: no such file"),
    ],
)
def test_mistakes_end_the_run_before_it_starts(folder, tmp_path, capsys, more, data, problem):
    assert train.main(words(folder, tmp_path / "run", *more, data=data)) in (1, 2)
    assert problem in capsys.readouterr().err


def test_prompts_of_several_tasks_are_compared_with_the_text(folder, tmp_path):
    """Without a soft prompt there is none to choose, and the first token of one record is timed under its own."""
    records = [{**record, "task": "ab"[number % 2]} for number, record in enumerate(RECORDS[:4])]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = [word for split in ("train", "test") for word in (f"--data.{split}", str(tmp_path / "tasks.jsonl"))]
    method = ["--method.name", "multitask_prompt_tuning", "--data.task", "task", "--train.steps", "1"]
    line = words(folder, tmp_path / "run", *data, *method, "--train.batch-size", "4", splits=())
    assert train.main(line) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["with_text"]["examples"] == 4
    assert set(results["distillation"]["first_token_seconds"]) == {"with_text", "soft_prompt", "no_prompt"}
    assert results["distillation"]["prompt_tokens"] == 3
