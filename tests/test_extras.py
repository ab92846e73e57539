"""Without an optional package, what needs it says so in a line that names the extra, before anything long."""

import json
import sys
from pathlib import Path

import pytest

import train
from spt_jax.commands.program import main
from spt_jax.data.sources import read_records
from spt_jax.errors import ConfigError
from spt_jax.evaluation import metrics
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.config import LogConfig
from spt_jax.training.logs import RunInfo, publish
from tests.jobs import words, write_task
from tests.wandb_calls import Wandb, WandbRun

QUICK = ("--train.steps", "2", "--train.evaluate-every", "2", "--data.limit", "8", "--data.hard-prompt")
TEXT = ("--loss.over", "None", "--data.verbalizers", "--evaluation.max-new-tokens", "2", "--evaluation.generate", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Makes modules look as if they were not installed."""
    return lambda *modules: [monkeypatch.setitem(sys.modules, module, None) for module in modules]


def test_a_run_without_matplotlib_draws_nothing_and_reports_to_wandb(files, tmp_path, without, capsys, monkeypatch):
    """Two starts of one W&B run: the training, and its results with the prompt."""
    without("matplotlib")
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train.main(words(files, tmp_path / "run", *QUICK, "--log.wandb", "project")) == 0
    check_wandb(tmp_path / "run", *wandb.runs)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "note: curves.png will not be drawn without matplotlib; to have it: pip install 'spt_jax[plots]'"
    assert last.endswith("run: report.html, results.json, metrics.jsonl")
    assert not (tmp_path / "run" / "curves.png").exists()
    assert main(["inspect", "--prompt", str(tmp_path / "run" / "prompt"), "--output", str(tmp_path / "seen")]) == 0
    assert "inspect.png will not be drawn" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["inspect.json"]


def test_a_failure_of_wandb_after_the_run_is_said(tmp_path, monkeypatch, capsys):
    wandb = Wandb()
    wandb.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    publish(tmp_path, LogConfig(wandb="project"), info=RunInfo({}), results={}, prompt=None)
    assert "results were not sent to Weights & Biases: ZeroDivisionError" in capsys.readouterr().err


def check_wandb(workdir: Path, training: WandbRun, ending: WandbRun) -> None:
    config = json.loads((workdir / "config.json").read_text())
    for run in (training, ending):
        assert run.options["id"] == (workdir / "wandb-id").read_text() and run.options["resume"] == "allow"
        assert run.options["project"] == "project" and run.finished
        assert {**run.options["config"], "inputs": config["inputs"]} == config
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss")) for line in lines] == [(at, own.get("loss")) for at, own in training.lines]
    assert [own.get("learning_rate") for _, own in training.lines] == [line.get("learning_rate") for line in lines]
    assert [line.get("learning_rate") for line in lines] == [0.1, 0.05, None]
    assert [line.get("tokens_per_second", 0) > 0 for line in lines] == [False, True, False]
    results = json.loads((workdir / "results.json").read_text())
    assert ending.summary["test/soft_prompt/accuracy"] == results["test"]["soft_prompt"]["accuracy"]
    (artifact,) = ending.artifacts
    assert artifact.type == "prompt" and artifact.folders == [str(workdir / "prompt")]


def test_a_run_without_the_metrics_leaves_them_out(files, tmp_path, without, capsys):
    without("sacrebleu", "rouge_score")
    assert train.main(words(files, tmp_path / "run", *QUICK, *TEXT)) == 0
    shown = capsys.readouterr().out
    note = "note: BLEU and ROUGE will be left out of the results; to have them: pip install 'spt_jax[metrics]'"
    assert shown.index(note) < shown.index("exact_match")
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["soft_prompt"]
    assert "token_f1" in results and not {"bleu", "rouge1", "rougeL"} & set(results)
    with pytest.raises(ConfigError, match=r"BLEU needs sacrebleu, .*pip install 'spt_jax\[metrics\]'"):
        metrics.bleu(["a"], ["a"])
    with pytest.raises(ConfigError, match=r"ROUGE needs rouge_score, .*pip install 'spt_jax\[metrics\]'"):
        metrics.rouge(["a"], ["a"])


def test_a_hub_data_set_without_datasets_is_refused_before_the_base_is_loaded(files, tmp_path, without, capsys):
    without("datasets")
    base = write_tiny_checkpoint(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"damaged")
    flags = ["--data.train", "owner/data", "--base.path", str(base)]
    assert train.main(words(files, tmp_path / "run", *flags)) == 2
    said = (
        "error: the hub data set 'owner/data' needs datasets, which is not installed: pip install 'spt_jax[datasets]'"
    )
    assert capsys.readouterr().err.strip() == said
    with pytest.raises(ConfigError, match="needs datasets"):
        read_records("owner/data")
    assert main(["inspect", "--prompt", str(tmp_path), "--data", "owner/data"]) == 2
    assert "needs datasets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flags", "extra"),
    [("tensorboardX", ["--log.tensorboard"], "tensorboard"), ("wandb", ["--log.wandb", "project"], "wandb")],
)
def test_a_log_without_its_package_is_refused_at_once(files, tmp_path, without, capsys, module, flags, extra):
    without(module)
    line = words(files, tmp_path / "run", *flags, "--data.train", "missing.jsonl")
    said = f"log.{extra} needs {module}, which is not installed: pip install 'spt_jax[{extra}]'"
    assert train.main(line) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert main(["sweep", *line]) == 2
    assert said in capsys.readouterr().err
