"""Sweeps end to end on a tiny model: a trial is the run that `train.py` would do, and nothing is lost on the way."""

import csv
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import train
from spt_jax.__main__ import main
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.workdir import MARKER, prepare_workdir
from spt_jax.studies.results import scored
from spt_jax.studies.trials import Trial
from spt_jax.training import halving
from tests.jobs import ROOT, arrays, words, write_task

QUICK = ("--train.steps", "8", "--train.evaluate-every", "4", "--train.checkpoint-every", "4")
LENGTHS = ("--lengths", "2", "4", "--seeds", "0", "1", "--patience", "1", "--resolution", "0.2", "--ensemble", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    with open(folder / "validation.jsonl", "a") as file:
        file.write((folder / "test.jsonl").read_text())  # 50 records
    return folder


def sweep(files: Path, workdir: Path, *more: str) -> int:
    return main(["sweep", *words(files, workdir, *QUICK, *more)])


@pytest.fixture(scope="module")
def lengths(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("sweeps") / "lengths"
    assert sweep(files, workdir, *LENGTHS) == 0
    return workdir


def table(workdir: Path) -> list[dict[str, str]]:
    with open(workdir / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_trial_is_a_run_of_its_own(files: Path, lengths: Path, tmp_path: Path):
    assert train.main(words(files, tmp_path / "run", *QUICK, "--method.length", "4", "--train.seed", "1")) == 0
    row = table(lengths)[3]
    assert (row["method.length"], row["seed"], row["status"]) == ("4", "1", "finished")
    np.testing.assert_array_equal(arrays(lengths / "trials" / "004"), arrays(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for split in ("validation", "test"):
        assert float(row[f"{split}.accuracy"]) == results[split]["soft_prompt"]["accuracy"]
        assert float(row[f"{split}.loss"]) == pytest.approx(results[split]["soft_prompt"]["loss"])
    assert int(row["trainable_parameters"]) == results["trainable_parameters"]
    assert int(row["best_step"]) == results["best_step"]


def test_the_table_says_what_the_predictions_say(lengths: Path):
    rows = table(lengths)
    assert [row["trial"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        folder = lengths / "trials" / f"{int(row['trial']):03d}"
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for split, count in (("validation", 50), ("test", 30)):
            right = [line["label"] == line["prediction"] for line in lines if line["split"] == split]
            assert len(right) == count and float(row[f"{split}.accuracy"]) == np.mean(right)
        assert int(row["prompt_bytes"]) == sum(file.stat().st_size for file in (folder / "prompt").iterdir())
    parquet = pyarrow.parquet.read_table(lengths / "trials.parquet").to_pylist()
    assert [str(row["method.length"]) for row in parquet] == [row["method.length"] for row in rows]
    assert [row["test.accuracy"] for row in parquet] == [float(row["test.accuracy"]) for row in rows]


def test_the_results_follow_from_the_table(lengths: Path):
    rows, results = table(lengths), json.loads((lengths / "results.json").read_text())
    means = {own["settings"]["method.length"]: own["validation"]["mean"] for own in results["settings"]}
    for length in ("2", "4"):
        own = [float(row["validation.accuracy"]) for row in rows if row["method.length"] == length]
        assert means[length] == pytest.approx(np.mean(own))
    best = max(results["settings"], key=lambda own: own["validation"]["mean"])
    within = [
        own["settings"]["method.length"]
        for own in results["settings"]
        if own["validation"]["mean"] >= best["validation"]["mean"] - best["validation"]["standard_error"]
    ]
    assert results["chosen"]["settings"]["method.length"] == min(within, key=int)
    chosen = lengths / "trials" / f"{results['chosen']['trial']:03d}"
    np.testing.assert_array_equal(arrays(lengths), arrays(chosen))
    assert results["steps"] == 4 * 8 == results["steps_of_all"]
    ensemble = results["ensemble"]
    own = [float(row["test.accuracy"]) for row in rows if int(row["trial"]) in ensemble["trials"]]
    assert len(own) == 3 and ensemble["mean_accuracy"] == pytest.approx(np.mean(own))
    assert (lengths / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    counts = np.asarray(results["classes"]["confusion"])
    assert np.trace(counts) / counts.sum() == pytest.approx(
        float(rows[results["chosen"]["trial"] - 1]["test.accuracy"])
    )
    assert all(
        f'<th scope="row" dir="auto">{number}</th>' in (lengths / "report.html").read_text() for number in range(1, 5)
    )


def test_a_stopped_sweep_goes_on_to_the_same_end(files, lengths, tmp_path, monkeypatch, capsys):
    calls = 0

    def place_and_signal(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == 2 * 8 + 2 * 3:  # in the second population, after its third step
            os.kill(os.getpid(), signal.SIGTERM)
        return place(*arguments, **named)

    place = halving.place_batch
    monkeypatch.setattr(halving, "place_batch", place_and_signal)
    assert sweep(files, tmp_path / "run", *LENGTHS) == 143
    assert "Continue with --resume" in capsys.readouterr().err
    assert [row["trial"] for row in table(tmp_path / "run")] == ["1", "2"]
    monkeypatch.setattr(halving, "place_batch", place)
    assert sweep(files, tmp_path / "run", *LENGTHS) == 2
    assert "already exists" in capsys.readouterr().err
    assert sweep(files, tmp_path / "run", *LENGTHS, "--resume") == 0
    assert "2 of them done" in capsys.readouterr().out
    differing = {k for a, b in zip(table(tmp_path / "run"), table(lengths), strict=True) for k in a if a[k] != b[k]}
    assert differing <= {"prompt_bytes"}  # the work directory's name, in the command that a prompt keeps
    for trial in ("001", "004"):  # ended before and after the stop
        info = json.loads((tmp_path / "run" / "trials" / trial / "prompt" / "prompt.json").read_text())
        assert info["extra"]["command"] == shlex.join(
            ["spt-jax", "sweep", *words(files, tmp_path / "run", *QUICK, *LENGTHS)]
        )
    np.testing.assert_array_equal(arrays(tmp_path / "run"), arrays(lengths))


def test_a_sweep_goes_on_with_the_same_data_and_base(files, lengths, tmp_path, capsys):
    own, workdir = tmp_path / "task", tmp_path / "run"
    shutil.copytree(files, own)
    shutil.copytree(lengths, workdir)
    saved = json.loads((workdir / "config.json").read_text())
    moved = json.loads(json.dumps(saved).replace(str(files), str(own)))
    (workdir / "config.json").write_text(json.dumps(moved))
    lines = (own / "validation.jsonl").read_text().splitlines(True)
    (own / "validation.jsonl").write_text("".join(reversed(lines)))
    assert sweep(own, workdir, *LENGTHS, "--resume") == 2
    assert f"the examples of {own / 'validation.jsonl'} are not those" in capsys.readouterr().err
    (own / "validation.jsonl").write_text("".join(lines))
    moved["inputs"]["base"][str(own / "model")]["weights"] = "0" * 64
    (workdir / "config.json").write_text(json.dumps(moved))
    assert sweep(own, workdir, *LENGTHS, "--resume") == 2
    message = capsys.readouterr().err
    assert f"{own / 'model'} is not the base that the run started with: weights is '" in message
    assert "' here, '0000000000000000' there" in message
    prepare_workdir(workdir, overwrite=True)
    assert os.listdir(workdir) == [MARKER]


def test_a_table_from_another_sweep_is_refused(files, lengths, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(lengths, workdir)
    assert sweep(files, workdir, *LENGTHS, "--resume", "--train.batch-size", "4") == 2
    assert "train.batch_size: 8 in the work directory, 4 now" in capsys.readouterr().err
    lines = (workdir / "trials.jsonl").read_text().replace('"seed": 1', '"seed": 7', 1)
    (workdir / "trials.jsonl").write_text(lines)
    assert sweep(files, workdir, *LENGTHS, "--resume") == 1
    assert "is from another sweep: trial 2" in capsys.readouterr().err
    (workdir / "trials.jsonl").write_text(lines[:500])
    assert sweep(files, workdir, *LENGTHS, "--resume") == 1
    assert "trials.jsonl, line 1, is damaged" in capsys.readouterr().err


def test_a_sweep_goes_on_with_the_data_that_it_began_with(files, lengths, tmp_path, capsys):
    shutil.copytree(lengths, tmp_path / "run")
    shutil.copytree(files, tmp_path / "files")
    shown = json.loads((lengths / "config.json").read_text())["data"]
    lines = (files / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "files" / "validation.jsonl").write_text("".join(lines[:-1]))
    saved = tmp_path / "run" / "config.json"
    saved.write_text(saved.read_text().replace(str(files), str(tmp_path / "files")))
    assert shown["validation"] == str(files / "validation.jsonl")
    assert sweep(tmp_path / "files", tmp_path / "run", *LENGTHS, "--resume") == 2
    assert f"the examples of {tmp_path / 'files' / 'validation.jsonl'} are not those" in capsys.readouterr().err


def test_a_trial_whose_validation_is_no_number_is_not_the_best():
    assert selection_score({"accuracy": 0.9, "loss": float("nan"), "examples": 10}) == -np.inf
    assert selection_score({"loss": float("inf")}) == -np.inf


def test_an_ensemble_takes_trials_that_came_to_their_end_first(files, tmp_path):
    """Of two that race, halving stops one; the other rate breaks."""
    over = ("--over", "optimizer.learning_rate=0.1,0.2,1e30", "--seeds", "0", "1", "--halving", "--ensemble", "2")
    assert sweep(files, tmp_path / "run", *over) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    ends = {int(row["trial"]): row["status"] for row in table(tmp_path / "run")}
    assert ends[results["ensemble"]["trials"][0]] == "finished"
    assert results["not_to_their_end"] == {str(n): end for n, end in ends.items() if end != "finished"}


def test_a_broken_trial_is_named_and_the_others_stand(files, lengths, tmp_path, capsys):
    over = ("--over", "optimizer.learning_rate=0.1,1e30", "--seeds", "1")
    assert sweep(files, tmp_path / "run", *over, "--method.length", "4") == 0
    sound, broken = table(tmp_path / "run")
    assert broken["status"].startswith("dropped at step") and broken["test.accuracy"] == ""
    said, told = capsys.readouterr()
    assert told.count("trial 2 (optimizer.learning_rate 1e30) is dropped at step") == 1
    assert "not finished: trial 2, dropped at step" in said
    assert sound["test.loss"] == table(lengths)[3]["test.loss"]  # the default rate is 0.1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["chosen"]["settings"] == {"optimizer.learning_rate": "0.1"}
    assert sweep(files, tmp_path / "none", "--over", "optimizer.learning_rate=1e30", "--seeds", "1") == 1
    assert "no trial finished" in capsys.readouterr().err


def test_any_field_can_be_swept_and_losers_stop(files, tmp_path):
    """Methods train in populations of their own; halving leaves one of four."""
    over = ("--over", "method.name=prompt_tuning,llama_adapter", "optimizer.learning_rate=0.05,0.1")
    assert sweep(files, tmp_path / "run", *over, "--seeds", "0", "1", "--halving") == 0
    rows = table(tmp_path / "run")
    assert len(rows) == 8
    for method in ("prompt_tuning", "llama_adapter"):
        ends = [row["status"] for row in rows if row["method.name"] == method]
        assert sorted(ends) == ["finished", "halved at step 1", "halved at step 1", "halved at step 2"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == sum(int(row["steps"]) for row in rows) == 2 * (8 + 1 + 1 + 2)


def row(number: int, setting: str, status: str = "finished") -> tuple[Trial, dict]:
    config = load_config_file(ROOT / "configs" / "local_files.py")
    return Trial(number, {"a": setting}, config), {"trial": number, "status": status, "validation.loss": 1.0}


def test_a_setting_that_lost_seeds_is_not_judged_by_the_rest(tmp_path):
    """The lucky seed that halving left of one setting does not beat another setting's three."""
    every = [row(1, "x"), row(2, "x", "halved at step 4"), row(3, "x", "dropped at step 2: loss is nan")]
    every += [row(n, "y") for n in (4, 5, 6)]
    for trial, _ in every:
        right = 10 if trial.number == 1 else 8
        lines = [{"record": n, "label": "l", "prediction": "l" if n <= right else "m"} for n in range(1, 11)]
        folder = tmp_path / "trials" / f"{trial.number:03d}"
        folder.mkdir(parents=True)
        text = "".join(json.dumps({"split": "validation", **line}) + "\n" for line in lines)
        (folder / "predictions.jsonl").write_text(text)
    rows = {trial.number: own for trial, own in every}
    (whole,) = scored(tmp_path, rows, [trial for trial, _ in every])
    assert whole.trials == (4, 5, 6) and whole.validation.mean == pytest.approx(0.8)
    (left,) = scored(tmp_path, rows, [trial for trial, _ in every[:3]])  # where no setting is whole
    assert left.trials == (1,) and left.validation.mean == 1.0


def test_dollars_and_switches_and_lists_can_be_swept(files, tmp_path):
    over = ("--over", r"data.prompt=<soft>{text} $5\n,<soft>{text}\n$ or $", "data.packing=True,False")
    assert sweep(files, tmp_path / "run", *over, "--seeds", "0", "--train.steps", "2") == 0
    assert {(r["data.prompt"], r["data.packing"]) for r in table(tmp_path / "run")} == {
        (prompt, packing) for prompt in ("<soft>{text} $5\n", "<soft>{text}\n$ or $") for packing in ("true", "false")
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--over", "optimizer.lerning_rate=0.1"), "did you mean 'optimizer.learning_rate'"),
        (("--seeds",), "give at least one seed"),
        (("--lengths", "4", "2"), "must be ascending"),
        (("--lengths", "2", "4000"), "4000 virtual tokens leave no room"),
        (("--lengths", "2", "4"), "Give at least 100 records"),
        (("--lengths", "2", "--over", "method.length=3"), "use --lengths instead"),
        (("--over", "train.seed=1,2"), "use --seeds instead"),
        (("--lengths", "2", "--halving"), "not compatible with --lengths"),
        (("--ensemble", "9"), "there are 3 trials"),
        (("--seeds", "-1", "--overwrite"), "train.seed is -1"),
        (("--draws-seed", "-1"), "--draws-seed is -1"),
        (("--ensemble", "2", "--over", "data.limit=20,30"), "needs the same records"),
        (("--ensemble", "2", "--over", "method.name=prompt_tuning,lopa"), "--ensemble is not compatible with lopa"),
        (
            ("--ensemble", "2", "--over", "data.verbalizers=good=H bad=L,bad=L good=H"),
            "different ones",
        ),
        (("--trials", "2", "--over", "method.length=3"), "does not have 2 different settings"),
        (("--over", "data.test={files}/test.jsonl,None"), "data.test None has test records, and the other has none"),
        (("--over", "data.validation={files}/test.jsonl,None"), "by validation, and data.validation None leaves none"),
        (("--over", "method.name=prompt_tuning,reft"), "method.name=reft: this method has no option --method.length"),
    ],
)
def test_wrong_sweeps_say_what_is_wrong(files, tmp_path, capsys, more, message):
    assert sweep(files, tmp_path / "run", *(word.replace("{files}", str(files)) for word in more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
