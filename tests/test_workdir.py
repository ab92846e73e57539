"""Work directories: nothing of the user's is deleted, one process writes at a time, what is resumed is the same."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import train
from spt_jax.__main__ import main
from spt_jax.errors import ConfigError, WriteError
from spt_jax.experiment.workdir import MARKER, check_workdir, held, open_workdir, prepare_workdir
from spt_jax.prompts import METHODS
from tests.disks import small_disk
from tests.jobs import ROOT, words

SETTINGS = {name: {} for name in ("base", "data", "method", "optimizer", "loss", "evaluation", "mesh", "log")} | {
    "train": {"steps": 40, "seed": 0}
}
FINGERPRINT = {"config": {"width": 8}, "weights": "b" * 64, "tokenizer": "c" * 64, "version": 1}
INPUTS = {"data": {"train.jsonl": ["a" * 64]}, "base": {"model": FINGERPRINT}}
OF_A_RUN = json.dumps(SETTINGS)
OF_A_COMPARISON = json.dumps({"config": SETTINGS, "prompts": ["prompt"]})
OF_A_MODEL = json.dumps({"model_type": "llama", "vocab_size": 512})


def begin(path: Path, settings: dict = SETTINGS) -> None:
    with held(path):
        open_workdir(path, settings, INPUTS, resume=False, overwrite=False)


def test_a_directory_without_permission_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch):
    """Root may write everywhere, so that the system's answer is made up."""
    refused = tmp_path / "shared"
    refused.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != refused)
    for path in (refused, refused / "runs" / "first"):
        with pytest.raises(ConfigError, match=r"cannot be written: no permission to write in .*shared$"):
            check_workdir(path, overwrite=False)
    check_workdir(tmp_path / "mine", overwrite=False)


@pytest.mark.parametrize(
    ("files", "ours"),
    [
        ({"config.json": OF_A_RUN}, True),
        ({"config.json": OF_A_COMPARISON}, True),
        ({MARKER: "{}", "config.json": OF_A_RUN}, True),
        ({MARKER: "{}", "config.json": OF_A_RUN[:50]}, True),
        ({MARKER: "", "metrics.jsonl": ""}, True),
        ({"config.json": OF_A_MODEL, "model.safetensors": "w"}, False),
        ({MARKER: "{}", "config.json": OF_A_MODEL, "prompt": "p"}, False),
        ({"config.json": OF_A_RUN[:50]}, False),
        ({"config.json": "[]"}, False),
        ({"config.json": json.dumps({"config": OF_A_MODEL})}, False),
        ({"thesis.txt": "years of work"}, False),
    ],
)
def test_overwrite_takes_only_what_is_ours(tmp_path: Path, files: dict[str, str], ours: bool):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if ours:
        check_workdir(tmp_path, overwrite=True)
        return
    with pytest.raises(ConfigError, match="was not created by this library"):
        prepare_workdir(tmp_path, overwrite=True)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_overwrite_leaves_what_no_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture):
    begin(tmp_path)
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "scalars").write_text("kept")
    (tmp_path / "tensorboard").symlink_to(elsewhere)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / ".prompt.new").mkdir()
    (tmp_path / "notes.txt").write_text("seed 3 was odd")
    with held(tmp_path):
        prepare_workdir(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [MARKER, "notes.txt"]
    assert (elsewhere / "scalars").read_text() == "kept"
    assert "notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize("relation", ["is", "contains", "is inside", "link"])
def test_overwrite_refuses_what_the_command_reads(tmp_path: Path, relation: str):
    run, away = tmp_path / "run", tmp_path / "away"
    begin(run)
    (run / "prompt").mkdir()
    (run / "prompt" / "prompt.json").write_text("{}")
    away.mkdir()
    (away / "link").symlink_to(run / "prompt" / "prompt.json")
    source = {"is": run, "contains": run / "prompt", "is inside": tmp_path, "link": away}[relation]
    named = {"link": "contains"}.get(relation, relation)
    with pytest.raises(ConfigError, match=rf"{named} .*which this command reads"):
        check_workdir(run, overwrite=True, reads=[tmp_path / "absent", source])
    check_workdir(run, resume=True, overwrite=False, reads=[source])
    assert (run / "prompt" / "prompt.json").exists()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path):
    begin(tmp_path / "run")
    program = (
        "import sys, time; from pathlib import Path; from spt_jax.experiment.workdir import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == "held\n"
            for way in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
                with pytest.raises(ConfigError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
                    check_workdir(tmp_path / "run", **way)
            with pytest.raises(ConfigError, match="in use by"), held(tmp_path / "run"):
                pass
        finally:
            first.send_signal(signal.SIGKILL)
    with held(tmp_path / "run"):
        open_workdir(tmp_path / "run", SETTINGS, INPUTS, resume=True, overwrite=False)


def changed(inputs: dict, kind: str, name: str, value: object) -> dict:
    return {**inputs, kind: {**inputs[kind], name: value}}


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        (SETTINGS, changed(INPUTS, "data", "train.jsonl", ["d" * 64]), "examples of train.jsonl are not those"),
        (
            SETTINGS,
            changed(INPUTS, "base", "model", {**FINGERPRINT, "weights": "e" * 64}),
            "model is not the base.*weights is 'eeee.*' here, 'bbbb.*' there",
        ),
        ({**SETTINGS, "train": {"steps": 40, "seed": 1}}, INPUTS, "train.seed: 0 in the work directory, 1 now$"),
        ({**SETTINGS, "train": {"steps": 80, "seed": 0}}, INPUTS, "train.steps: 40 in the work directory, 80 now"),
    ],
)
def test_what_is_resumed_is_the_same(tmp_path: Path, settings: dict, inputs: dict, message: str):
    begin(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with held(tmp_path / "run"), pytest.raises(ConfigError, match=message):
        open_workdir(tmp_path / "run", settings, inputs, resume=True, overwrite=False)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (
            "prompt_tuning",
            "start a new run from it: --workdir OTHER --method.init.name prompt --method.init.path .*run/",
        ),
        ("state_tuning", "start a new run from it: --workdir OTHER --method.path .*run/prompt$"),
        ("progressive_prompts", "in a new run: --workdir OTHER$"),
        ("reft", "in a new run: --workdir OTHER$"),
    ],
)
def test_more_steps_are_a_new_run_from_the_prompt_if_the_method_can(tmp_path: Path, name: str, advice: str):
    method = {"name": name, **dataclasses.asdict(METHODS[name]())}
    begin(tmp_path / "run", {**SETTINGS, "method": method})
    longer = {**SETTINGS, "method": method, "train": {"steps": 80, "seed": 0}}
    with held(tmp_path / "run"), pytest.raises(ConfigError, match=advice):
        open_workdir(tmp_path / "run", longer, INPUTS, resume=True, overwrite=False)


def test_a_run_of_version_0_1_is_resumed_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_text(OF_A_RUN)
    for line in ("without digests", ""):
        with held(tmp_path):
            open_workdir(tmp_path, {**SETTINGS, "mesh": {"data": 2}}, INPUTS, resume=True, overwrite=False)
        assert line in (said := capsys.readouterr().out) and bool(line) == bool(said)


def test_a_run_that_recorded_no_task_had_the_default_one(tmp_path: Path):
    begin(tmp_path)
    with held(tmp_path):
        open_workdir(tmp_path, {**SETTINGS, "task": {"name": None}}, INPUTS, resume=True, overwrite=False)
        with pytest.raises(ConfigError, match=r"task\.name: None in the work directory, 'rating' now"):
            open_workdir(tmp_path, {**SETTINGS, "task": {"name": "rating"}}, INPUTS, resume=True, overwrite=False)


@pytest.mark.parametrize("content", ["", '{"base": ', "[]", "\x00\x00", "\udcff"])
def test_a_damaged_config_names_a_way(tmp_path: Path, content: str):
    begin(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with held(tmp_path), pytest.raises(ConfigError, match=r"config\.json is damaged.*start over with --overwrite"):
        open_workdir(tmp_path, SETTINGS, INPUTS, resume=True, overwrite=False)


def test_a_directory_that_cannot_be_written(tmp_path: Path):
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        begin(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for path in (disk / "run", disk / "new"):
            with pytest.raises(WriteError, match=r"Read-only file system\). Choose a place"), held(path):
                pass
    with small_disk(tmp_path / "full", 8192) as disk:
        (disk / "run").mkdir()
        (disk / "filler").write_bytes(bytes(8192 - 4096))
        with pytest.raises(WriteError, match=r"No space left on device\). Free some space"):
            begin(disk / "run")


COMMANDS = {
    "train": lambda line: train.main(line),
    "sweep": lambda line: main(["sweep", *line]),
    "compare": lambda line: main(["compare", *line, "--prompts", "prompt"]),
    "find-rate": lambda line: main(["find-rate", *line]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_what_is_in_use_or_read(tmp_path: Path, capsys: pytest.CaptureFixture, command: str):
    """Before it reads anything: there are no data and no base here."""
    begin(tmp_path / "run")
    for more in (["--overwrite"], *([["--resume"]] if command in ("train", "sweep") else [])):
        with held(tmp_path / "run"):
            assert COMMANDS[command]([*words(tmp_path, tmp_path / "run"), *more]) == 2
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err
    begin(tmp_path / "model")
    assert COMMANDS[command]([*words(tmp_path, tmp_path / "model"), "--overwrite"]) == 2
    assert f"--overwrite: {tmp_path / 'model'} is {tmp_path / 'model'}" in capsys.readouterr().err
