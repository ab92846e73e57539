"""What TensorBoard and Weights & Biases get from a sweep: a run for each trial."""

import csv
import json
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from spt_jax.commands.program import main
from spt_jax.studies.trial_logs import by_trial
from tests.jobs import words, write_task
from tests.wandb_calls import Wandb, WandbRun

OPTIONS = ("--train.steps", "8", "--train.evaluate-every", "4", "--data.hard-prompt", "--data.limit", "8")
OVER = ("--over", "optimizer.learning_rate=0.05,0.1", "--seeds", "0", "1", "--halving")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars in the event files of a directory, by name and step."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            content = content[16 + length :]
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[WandbRun]]:
    folder = tmp_path_factory.mktemp("sweep")
    write_task(folder)
    wandb = Wandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        line = words(folder, folder / "rates", *OPTIONS, *OVER, "--log.wandb", "project", "--log.tensorboard")
        assert main(["sweep", *line]) == 0
    return folder / "rates", wandb.runs


@pytest.fixture(scope="module")
def rows(swept: tuple[Path, list[WandbRun]]) -> list[dict[str, str]]:
    with open(swept[0] / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_trial_is_a_run_in_the_group_of_the_sweep(swept, rows):
    workdir, runs = swept
    assert len(runs) == 8  # each trial is trained, and then gets its results
    groups = {run.options["group"] for run in runs}
    assert groups == {f"rates {(workdir / 'wandb-id').read_text()[:8]}"}
    assert len({run.options["id"] for run in runs}) == 4
    for row in rows:
        own = workdir / "trials" / f"{int(row['trial']):03d}"
        training, ending = (run for run in runs if run.options["id"] == (own / "wandb-id").read_text())
        rate, seed = row["optimizer.learning_rate"], row["seed"]
        for run in (training, ending):
            assert run.options["name"] == f"trial {row['trial']}: optimizer.learning_rate {rate}, seed {seed}"
            assert run.options["project"] == "project" and run.options["reinit"] == "create_new" and run.finished
            config = run.options["config"]
            assert (str(config["optimizer"]["learning_rate"]), str(config["train"]["seed"])) == (rate, seed)
        for split in ("validation", "test"):
            assert ending.summary[f"{split}.accuracy"] == float(row[f"{split}.accuracy"])
        assert ending.summary["status"] == row["status"]
        (artifact,) = ending.artifacts
        assert artifact.type == "prompt" and artifact.folders == [str(own / "prompt")]
        assert artifact.name == f"prompt-{run.options['id']}"


def test_the_curves_of_a_trial_end_where_halving_stops_it(swept, rows):
    workdir, runs = swept
    (population,) = (workdir / "populations").iterdir()
    members = json.loads((population / "members.json").read_text())
    lines = [json.loads(line) for line in (population / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["status"] for row in rows) == [
        "finished",
        "halved at step 1",
        "halved at step 1",
        "halved at step 2",
    ]
    for row in rows:
        own = workdir / "trials" / f"{int(row['trial']):03d}"
        number = str(members.index(int(row["trial"])))
        losses = {line["step"]: line["loss"][number] for line in lines if number in line.get("loss", {})}
        assert list(losses) == list(range(1, int(row["steps"]) + 1))
        events = scalars(own / "tensorboard")
        assert events["loss"] == pytest.approx(losses, rel=1e-6)
        validated = {line["step"]: line["validation"] for line in lines if number in line.get("validation", {})}
        assert events["validation/accuracy"] == pytest.approx(
            {step: by_number[number]["accuracy"] for step, by_number in validated.items()}, rel=1e-6
        )
        (training, _) = (run for run in runs if run.options["id"] == (own / "wandb-id").read_text())
        assert {step: values["loss"] for step, values in training.lines if "loss" in values} == losses
        rate = float(row["optimizer.learning_rate"])
        assert training.lines[0][1]["learning_rate"] == pytest.approx(rate, rel=1e-6)


def test_a_line_is_split_by_trial():
    line = {"loss": {"0": 1.0, "2": 2.0}, "tokens_per_second": 5.0, "validation": {"2": {"accuracy": 0.5}}}
    assert by_trial(line) == {0: {"loss": 1.0}, 2: {"loss": 2.0, "validation": {"accuracy": 0.5}}}
