"""The main job end to end on a tiny model: what it writes, that it resumes bit for bit, how it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import spt_jax
import spt_jax.__main__
import spt_jax.commands.train
import train
from spt_jax.experiment import training
from spt_jax.experiment.command_line import parse_train
from spt_jax.experiment.workdir import MARKER, prepare_workdir
from spt_jax.training import loop, single
from tests.jobs import ROOT, arrays, history, losses, stopped_at_batch, unmeasured, words, write_task


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(words(files, workdir)) == 0
    return workdir


def test_leaves_what_scripts_rely_on(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) >= {
        "test", "validation", "steps", "trainable_parameters", "base_parameters", "prompt_bytes", "train_seconds",
        "compile_seconds", "examples_per_second", "tokens_per_second", "flops_utilization", "peak_memory_bytes",
        "device", "versions", "command",
    }  # fmt: skip
    assert set(results["test"]) == {"soft_prompt", "hard_prompt", "no_prompt"}
    assert results["steps"] == 40 and results["trainable_parameters"] == 4 * 32
    assert results["tokens_per_second"] > results["examples_per_second"] > 0 < results["flops_utilization"] < 1
    assert results["prompt_bytes"] <= 4 * 4 * 32 + 8192
    assert results["test"]["hard_prompt"]["text"] in ("{text}\nIt was", "Is {text} good?\n")
    counts = np.asarray(results["classes"]["soft_prompt"]["confusion"])
    assert counts.sum() == 30 and np.trace(counts) / 30 == pytest.approx(results["test"]["soft_prompt"]["accuracy"])
    scores = [results["test"][name]["accuracy"] for name in ("soft_prompt", "hard_prompt")]
    assert results["soft_against_written"]["ahead"] == pytest.approx(scores[0] - scores[1])
    assert len(results["nearest_tokens"]) == 4 and {len(row) for row in results["nearest_tokens"]} == {5}
    assert results["data"] == json.loads((finished / "config.json").read_text())["inputs"]["data"]
    again = parse_train([str(finished / "config.json"), "--train.seed", "1"]).config
    assert again.train.seed == 1 and again.data.prompt == "<soft>{text}\n" and again.method.length == 4
    report = (finished / "report.html").read_text()
    assert f"{scores[0]:.3f}" in report and results["date"] in report
    assert (finished / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, last = np.mean([v for _, v in losses(finished)[:5]]), np.mean([v for _, v in losses(finished)[-5:]])
    assert last < first


def test_it_is_the_prompt_of_fit_bit_for_bit(files: Path, finished: Path, tmp_path: Path):
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", verbalizers={"good": "H", "bad": "L"})
    train_, validation = (spt_jax.read_records(str(files / f"{split}.jsonl")) for split in ("train", "validation"))
    base, method = spt_jax.load_base(files / "model"), spt_jax.PromptTuning(length=4)
    options = {"validation": validation, "steps": 40, "batch_size": 8, "evaluate_every": 10}
    result = spt_jax.fit(base, method, template, train_, **options)
    saved, theirs = result.prompt.save(tmp_path / "prompt"), finished / "prompt"
    assert (saved / "prompt.safetensors").read_bytes() == (theirs / "prompt.safetensors").read_bytes()
    ours, info = (json.loads((folder / "prompt.json").read_text()) for folder in (saved, theirs))
    del info["extra"]["command"]
    assert ours == info == result.prompt.info
    assert unmeasured(list(result.history)) == history(finished)
    results = json.loads((finished / "results.json").read_text())
    names = ("steps", "best_step", "trainable_parameters")
    assert [getattr(result, name) for name in names] == [results[name] for name in names]
    assert result.validation == info["extra"]["validation"]


@pytest.mark.parametrize("name", ["prefix_tuning", "deep_prompts", "llama_adapter"])
def test_methods_without_token_rows(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    """A bare <soft> is nothing to them; what they save is evaluated and classifies without a word more."""
    assert train.main(words(files, tmp_path / "run", "--method.name", name, "--train.steps", "20")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    saved = load_file(tmp_path / "run" / "prompt" / "prompt.safetensors")
    derived = ("gated/keys", "gated/values")
    assert results["trainable_parameters"] == sum(array.size for key, array in saved.items() if key not in derived)
    results = results["test"]
    assert results["hard_prompt"]["examples"] == results["no_prompt"]["examples"] == 30
    prompt = str(tmp_path / "run" / "prompt")
    capsys.readouterr()
    output = tmp_path / "metrics.json"
    words_ = ["evaluate", "--prompt", prompt, "--data", str(files / "test.jsonl"), "--output", str(output)]
    assert spt_jax.__main__.main(words_) == 0
    again = json.loads(output.read_text())["soft_prompt"]
    assert again["accuracy"] == results["soft_prompt"]["accuracy"]
    assert again["loss"] == pytest.approx(results["soft_prompt"]["loss"], rel=1e-5)
    assert spt_jax.__main__.main(["generate", "--prompt", prompt, "the nice", "a poor"]) == 0
    assert capsys.readouterr().out.split()[-2:] in (["good", "bad"], ["good", "good"], ["bad", "bad"], ["bad", "good"])
    assert spt_jax.__main__.main(["inspect", "--prompt", prompt]) == 0
    assert name in capsys.readouterr().out
    assert train.main(words(files, tmp_path / "two", "--method.name", name, "--data.prompt", "<soft:4>{text}")) == 2
    assert f"data.prompt has 4 virtual tokens, but {name} has none" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_bad_records_of_any_split_are_found_before_training(files, tmp_path, capsys, split: str):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((files / f"{split}.jsonl").read_text() + '{"text": "so so", "label": "god"}\n')
    assert train.main(words(files, tmp_path / "run", f"--data.{split}", str(bad))) == 1
    count = {"train": 61, "validation": 21, "test": 31}[split]
    assert f"{bad}: record {count}: label 'god' has no verbalizer; did you mean 'good'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_heads_options(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    head = ("--method.name", "deep_prompts")
    assert train.main(words(files, tmp_path / "a", *head, "--method.classes", "3")) == 2
    assert "method.classes is 3, but there are 2 verbalizers" in capsys.readouterr().err
    assert train.main(words(files, tmp_path / "b", *head, "--loss.over", "verbalizers")) == 2
    assert "loss.over=verbalizers is not compatible with a classification head" in capsys.readouterr().err


def test_metrics_can_be_computed_again_from_the_predictions(files: Path, finished: Path):
    results = json.loads((finished / "results.json").read_text())["test"]
    texts = [json.loads(line)["text"] for line in (files / "test.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    for name, metrics in results.items():
        own = [line for line in lines if line["prompt"] == name]
        assert len(own) == metrics["examples"] == 30
        assert [line["fields"]["text"] for line in own] == texts
        assert np.mean([line["label"] == line["prediction"] for line in own]) == pytest.approx(metrics["accuracy"])


def test_killed_and_resumed_is_the_same_run_bit_for_bit(files: Path, finished: Path, tmp_path: Path):
    """SIGKILL at step 31, after the save at step 20."""
    workdir = tmp_path / "killed"
    program = f"""
import os, signal, sys
import train
from spt_jax.training import single
from tests.jobs import ROOT, arrays, losses, words, write_task
place, calls = single.place_batch, []
def place_or_die(batch, mesh):
    calls.append(1)
    if len(calls) == 32:
        os.kill(os.getpid(), signal.SIGKILL)
    return place(batch, mesh)
single.place_batch = place_or_die
train.main({words(files, workdir)!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert train.main(words(files, workdir, "--resume")) == 0
    assert losses(workdir) == losses(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()
    whole, resumed = (json.loads((w / "results.json").read_text()) for w in (finished, workdir))
    assert whole["test"] == resumed["test"] and whole["best_step"] == resumed["best_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resume_goes_on(files, finished, tmp_path, capsys, number):
    workdir = tmp_path / "stopped"
    with stopped_at_batch(14, number):
        assert train.main(words(files, workdir)) == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert train.main(words(files, workdir, "--resume")) == 0
    assert losses(workdir) == losses(finished)
    assert arrays(workdir).tobytes() == arrays(finished).tobytes()


def test_a_signal_during_the_last_validation_is_not_lost(files, finished, tmp_path, monkeypatch, capsys):
    evaluate, calls = training.evaluate, []

    def evaluate_and_signal(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **named)

    workdir = tmp_path / "stopped"
    monkeypatch.setattr(training, "evaluate", evaluate_and_signal)
    assert train.main(words(files, workdir)) == 143
    assert "stopped by SIGTERM after step 40; the state is saved. Continue with --resume" in capsys.readouterr().err
    assert not (workdir / "results.json").exists()
    monkeypatch.undo()
    assert train.main(words(files, workdir, "--resume")) == 0
    assert losses(workdir) == losses(finished)


def test_other_data_or_another_base_is_not_resumed(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """At the same paths, where the config says nothing of it."""
    own, workdir = tmp_path / "task", tmp_path / "run"
    shutil.copytree(files, own)
    line = words(own, workdir, "--train.steps", "2")
    assert train.main(line) == 0
    for split in ("train", "validation", "test"):
        path = own / f"{split}.jsonl"
        content = path.read_text()
        for other in ("".join(reversed(content.splitlines(True))), "".join(content.splitlines(True)[:-1])):
            path.write_text(other)
            assert train.main([*line, "--resume"]) == 2
            assert (
                f"the examples of {path} are not those that the run in {workdir} started with"
                in capsys.readouterr().err
            )
        path.write_text(content)
    weights = own / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * np.float32(1.05)}, weights)
    assert train.main([*line, "--resume"]) == 2
    assert f"{own / 'model'} is not the base that the run started with: weights is " in capsys.readouterr().err


def test_one_record_a_step(files: Path, tmp_path: Path):
    assert train.main(words(files, tmp_path / "run", "--train.steps", "3", "--train.batch-size", "1")) == 0
    assert len(losses(tmp_path / "run")) == 3


def test_overwriting_leaves_nothing_of_a_run(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    prepare_workdir(tmp_path / "run", overwrite=True)
    assert os.listdir(tmp_path / "run") == [MARKER]


def test_resumes_on_another_mesh(files: Path, finished: Path, tmp_path: Path):
    """20 steps on one device, 20 on four: the same to float tolerance."""
    workdir = tmp_path / "moved"
    with stopped_at_batch(20):
        assert train.main(words(files, workdir)) == 143
    assert train.main(words(files, workdir, "--resume", "--mesh.data", "2", "--mesh.tensor", "2")) == 0
    np.testing.assert_allclose(np.asarray(losses(workdir)), np.asarray(losses(finished)), rtol=2e-3)


def test_nan_stops_with_the_step_and_keeps_the_last_good_state(files: Path, tmp_path: Path, capsys):
    workdir = tmp_path / "nan"
    wild = ["--optimizer.name", "sgd", "--optimizer.learning-rate", "1e38", "--optimizer.clip-norm", "0"]
    assert train.main(words(files, workdir, *wild)) == 1
    assert re.search(r"step [12]: .*(nan|inf)", capsys.readouterr().err)
    state = loop.Checkpoints(workdir / "checkpoints")
    assert state.latest_step() == 0
    state.close()
    assert not (workdir / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--train.seed", "1", "--resume"], 2, "train.seed: 0 in the work directory, 1 now"),
        ([], 2, "Use --resume to continue or --overwrite"),
        (["--resume", "--overwrite"], 2, "are mutually exclusive"),
        (["--data.max-length", "1000", "--resume"], 2, "has 128 positions"),
        (["--method.length", "128", "--resume"], 2, "leave no room"),
        (["--data.target", "{lable}", "--resume"], 1, "did you mean 'label'"),
        (["--base.path", "/nowhere/at/all", "--resume"], 1, "no such directory"),
        (["--mesh.tensor", "3", "--resume"], 2, "does not divide"),
        (["--mesh.data", "16", "--resume"], 2, "needs 16 devices; there are 8"),
        (["--mesh.data", "-1", "--train.microbatches", "2", "--resume"], 2, "use at least 16, or a smaller mesh"),
        (["--data.train", "missing.jsonl", "--resume"], 1, "missing.jsonl"),
        (["--loss.class-weights", "1", "--resume"], 2, "1 numbers for 2 classes"),
        (["--train.steps", "80", "--resume"], 2, "--method.init.name prompt --method.init.path"),
        (["--train.batch-size", "1000000", "--resume"], 2, "has 60 records"),
        (["--resume-from", "7"], 1, "no checkpoint of step 7; there are ["),
    ],
)
def test_wrong_words(files: Path, finished: Path, capsys, more, code, message):
    before = (finished / "results.json").read_bytes()
    assert train.main(words(files, finished, *more)) == code
    assert message in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.parametrize("words_", [["--train.steps", "2147483648"], ["--train.seed", "4294967296"]])
def test_numbers_beyond_32_bits(files: Path, tmp_path: Path, capsys, words_: list[str]):
    with pytest.raises(SystemExit) as ended:
        train.main(words(files, tmp_path / "run", *words_))
    assert ended.value.code == 2
    assert f"{words_[0].removeprefix('--')} is {words_[1]}" in capsys.readouterr().err


def test_out_of_memory_names_what_is_large(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9999 bytes.")

    monkeypatch.setattr(single, "jit_train_step", lambda *_: SimpleNamespace(lower=step))
    assert train.main(words(files, tmp_path / "run", "--train.microbatches", "2")) == 1
    message = capsys.readouterr().err
    assert "out of memory" in message and "activations kept for the backward pass" in message
    assert "--train.microbatches" in message and "--base.remat full" in message


def test_overwrite_spares_directories_of_others(files: Path, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train.main(words(files, tmp_path, "--overwrite")) == 2
    assert (tmp_path / "thesis.txt").exists() and "was not created by this library" in capsys.readouterr().err


def test_config_file_errors(tmp_path: Path, capsys):
    assert train.main(["configs/quickstrat.py"]) == 2
    assert "did you mean configs/quickstart.py" in capsys.readouterr().err
    bad = tmp_path / "bad.py"
    bad.write_text("from spt_jax.config import TrainConfig\ndef get_config():\n    return TrainConfig(stepz=1)\n")
    assert train.main([str(bad)]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    bad.write_text("from spt_jax.sharding import MeshConfig\n")
    assert train.main([str(bad)]) == 2
    message = capsys.readouterr().err
    assert "No module named 'spt_jax.sharding'; modules have moved: config files import from spt_jax.config" in message
    bad.write_text("import absent_library\n")
    assert train.main([str(bad)]) == 2
    assert capsys.readouterr().err.endswith("bad.py: No module named 'absent_library'\n")


def test_dry_run_shows_tokens_and_writes_nothing(files: Path, tmp_path: Path, capsys):
    assert train.main(words(files, tmp_path / "dry", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "note: this prompt cannot be exported to PEFT: PEFT puts all virtual tokens first, but" in shown
    assert "<soft 0>|<soft 1>|<soft 2>|<soft 3>" in shown and "packing rate" in shown and "MiB" in shown
    assert shown.count("(the label)") == 3
    assert not (tmp_path / "dry").exists()


def test_a_trace_and_compiled_programs_for_the_next_run(files: Path, tmp_path: Path):
    """In processes of their own: a process keeps one cache. The second run finds all its programs there."""
    cache = tmp_path / "cache"

    def run(name: str, *more: str) -> float:
        line = words(files, tmp_path / name, "--train.steps", "8", "--compilation-cache", str(cache), *more)
        environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        subprocess.run([sys.executable, ROOT / "train.py", *line], check=True, capture_output=True, env=environment)
        return json.loads((tmp_path / name / "results.json").read_text())["compile_seconds"]

    first = run("first", "--profile", "2")
    (trace,) = (tmp_path / "first" / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert content.count(b"train_step") and b"mlp" in content and b"attention" in content
    assert not (tmp_path / "second" / "profile").exists()
    programs = {path.name for path in cache.glob("*-cache")}
    assert any("train_step" in name for name in programs)
    assert run("second") < 0.7 * first
    assert {path.name for path in cache.glob("*-cache")} == programs
    np.testing.assert_array_equal(arrays(tmp_path / "first"), arrays(tmp_path / "second"))


def test_generation_task(files: Path, tmp_path: Path):
    """No verbalizers: next-token loss, perplexity, and generated answers."""
    workdir = tmp_path / "generation"
    line = words(files, workdir, "--train.steps", "4", "--evaluation.max-new-tokens", "4", "--evaluation.generate", "5")
    at = line.index("--data.verbalizers")
    assert train.main(line[:at] + line[at + 3 :]) == 0
    results = json.loads((workdir / "results.json").read_text())["test"]["soft_prompt"]
    assert set(results) >= {"loss", "perplexity", "exact_match", "token_f1", "bleu", "rougeL"}
    assert results["perplexity"] == pytest.approx(np.exp(results["loss"]), rel=1e-4)
    assert results["generated"] == 5
