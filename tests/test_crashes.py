"""A run that is cut off at any change to its work directory, and resumed, comes to the same end bit for bit.

SPT_JAX_ALL_CRASHES=1 tries every change; otherwise a few, spread over the run. `benchmarks/kills.py` kills whole
processes of runs and sweeps.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

import spt_jax.commands.train
import train
from spt_jax.experiment import training
from spt_jax.runtime.files import write_bytes
from spt_jax.training import single
from tests.crashes import Recorder
from tests.jobs import arrays, history, unmeasured, words, write_task

SHORT = ("--train.steps", "4", "--train.evaluate-every", "2", "--train.checkpoint-every", "1", "--train.keep", "1")
EVERY = 1 if os.environ.get("SPT_JAX_ALL_CRASHES") else 24


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory):
    """Runs the short job in a work directory. Its base, data and programs are read and compiled once."""
    files = tmp_path_factory.mktemp("task")
    write_task(files)
    patch, loaded, steps = pytest.MonkeyPatch(), [], []
    load, make = spt_jax.commands.train.load_experiment, single.make_train_step

    def load_once(config, **study):
        if not loaded:
            loaded.append(load(config, **study))
        return dataclasses.replace(loaded[0], config=dataclasses.replace(loaded[0].config, train=config.train))

    def make_once(*arguments):
        if not steps:
            steps.append(make(*arguments))
        return steps[0]

    patch.setattr(spt_jax.commands.train, "load_experiment", load_once)
    patch.setattr(single, "make_train_step", make_once)
    patch.setattr(training, "start_ahead", lambda *_: None)
    patch.setattr(spt_jax.commands.train, "plot_curves", lambda path, *_, **__: write_bytes(path, b"PNG"))
    yield lambda workdir, *more: train.main(words(files, workdir, *SHORT, *more))
    patch.undo()


def end(workdir: Path) -> dict[str, object]:
    """All that a run has come to, but for how long it took."""
    results = json.loads((workdir / "results.json").read_text())
    return {
        "metrics": history(workdir),
        "predictions": (workdir / "predictions.jsonl").read_bytes(),
        "prompt": arrays(workdir).tobytes(),
        "results": unmeasured(results),
        "files": sorted(os.listdir(workdir)),
        "checkpoints": sorted(os.listdir(workdir / "checkpoints")),
    }


@pytest.fixture(scope="module")
def crashed(job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, dict[str, object]]:
    """A run's work directory, what crashes would have left of it, and its end."""
    folder = tmp_path_factory.mktemp("crashes")
    recorder = Recorder(folder / "run", folder / "copies", EVERY)
    with recorder.recording():
        assert job(folder / "run") == 0
    assert recorder.changes > 100
    return folder / "run", recorder, end(folder / "run")


@pytest.mark.parametrize("kind", ["killed", "without power"])
def test_every_crash_is_resumed_to_the_same_end(job, crashed, capfd, kind):
    workdir, recorder, whole = crashed  # resumed where it was, because the saved prompt's command names it
    for copy, lost in recorder.crashes:
        shutil.rmtree(workdir)
        shutil.copytree(copy, workdir)
        for path, content in lost.items() if kind == "without power" else ():
            (workdir / path).write_bytes(content)
        began = (workdir / "config.json").exists()
        assert job(workdir, *(["--resume"] if began else [])) == 0, (copy.name, capfd.readouterr().err)
        assert end(workdir) == whole, copy.name
        capfd.readouterr()


def test_a_finished_run_that_is_resumed_stays_as_it_is(job, tmp_path: Path):
    workdir = tmp_path / "run"
    assert job(workdir) == 0
    before = json.loads((workdir / "results.json").read_text())
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp-removed").mkdir()
    assert job(workdir, "--resume") == 0
    after = json.loads((workdir / "results.json").read_text())
    for name in ("train_seconds", "examples_per_second", "tokens_per_second", "flops_utilization", "prompt_bytes"):
        assert after[name] == before[name]
    assert before["train_seconds"] > 0 < before["tokens_per_second"]
    assert "3.orbax-checkpoint-tmp-removed" not in os.listdir(workdir / "checkpoints")


def test_a_damaged_newest_checkpoint(job, crashed, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The run goes on from the one before it and says so, or from the one that is asked for."""
    workdir = crashed[0]
    shutil.rmtree(workdir)
    assert job(workdir, "--train.keep", "3") == 0
    whole = end(workdir)
    last, *before = sorted(map(int, os.listdir(workdir / "checkpoints")), reverse=True)
    assert last == 4 and len(before) >= 2
    shutil.copytree(workdir, tmp_path / "copy")
    files = {}  # of every kind one; the names of those with arrays are random
    for path in sorted((workdir / "checkpoints" / "4").rglob("*")):
        if path.is_file():
            files["an array" if len(path.name) > 30 else path.name] = path
    for file in files.values():
        shutil.rmtree(workdir)
        shutil.copytree(tmp_path / "copy", workdir)
        file.write_bytes(file.read_bytes()[:-7])
        capsys.readouterr()
        assert job(workdir, "--train.keep", "3", "--resume") == 0
        error = capsys.readouterr().err
        if file.name in ("_CHECKPOINT_METADATA", "_METADATA", "data.json"):
            assert "4: damaged" in error and "Resuming from step 3, the newest intact" in error
        assert {**end(workdir), "checkpoints": None} == {**whole, "checkpoints": None}, file
    assert job(workdir, "--train.keep", "3", "--resume-from", "7") == 1
    assert "no checkpoint of step 7; there are" in capsys.readouterr().err
    assert job(workdir, "--train.keep", "3", "--resume-from", str(before[1])) == 0
    assert end(workdir)["prompt"] == whole["prompt"] and end(workdir)["metrics"] == whole["metrics"]
    shutil.rmtree(workdir / "checkpoints" / "4" / "train")
    assert job(workdir, "--train.keep", "3", "--resume-from", "4") == 1
    assert "4: damaged" in capsys.readouterr().err
