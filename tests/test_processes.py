"""Two processes of four devices each: the same run as one, on any mesh; they stop together and fail together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from spt_jax.errors import ConfigError
from spt_jax.runtime import rendezvous
from spt_jax.runtime.processes import ProcessesConfig, from_first
from tests.jobs import ROOT, losses, words, write_task
from tests.quick import QUICK_FLAGS

# A run that, once asked for its n-th batch, does what the test says.
PROGRAM = """
import os, signal, sys
import train
from spt_jax.runtime import processes
from spt_jax.runtime import rendezvous
from spt_jax.training import single
processes._BEAT_SECONDS, processes._LOST_SECONDS, rendezvous.WAIT_SECONDS = 0.5, 5.0, 30.0
place, left = single.place_batch, [{batches}]
def place_and_act(batch, mesh):
    left[0] -= 1
    if left[0] == 0:
        {action}
    return place(batch, mesh)
single.place_batch = place_and_act
sys.exit(train.main({words!r}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves of 20 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(words(files, workdir, "--train.steps", "20")) == 0
    return workdir


def launch(*programs: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of one process per program, {address} and {index} filled in."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK_FLAGS}",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for program in programs
    ]
    try:
        said = [process.communicate(timeout=240) for process in running[:1]]
        running[-1].send_signal(signal.SIGCONT)
        said += [process.communicate(timeout=240) for process in running[1:]]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def two(files: Path, workdir: Path, *more: str, action: str = "pass", batches: int = 0, only: tuple[str, ...] = ()):
    """The small job on eight devices of two processes; the second does `action` and alone has the flags `only`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ("--train.steps", "20", "--processes.coordinator", address, "--processes.count", "2", "--processes.index")
    programs = []
    for index in (0, 1):
        own = words(files, workdir, *flags, str(index), *more, *(only if index else ()))
        programs.append(PROGRAM.format(batches=batches if index else 0, action=action, words=own))
    return launch(*programs)


def test_two_processes_are_one_run_and_one_goes_on_for_both(files: Path, whole: Path, tmp_path: Path):
    """SIGTERM to the second stops both after the same step; one process with one device takes it to the end."""
    moved = tmp_path / "moved"
    mesh = ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.sequence", "2")
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    (code, said, error), (code_of_second, said_by_second, _) = two(files, moved, *mesh, action=act, batches=12)
    assert (code, code_of_second) == (143, 143), error
    assert "8 x cpu" in said and "frozen parameters" not in said_by_second
    assert "stopped by SIGTERM after step 1" in error
    steps = [step for step, _ in losses(moved)]
    assert 12 <= len(steps) < 20 and steps == list(range(1, len(steps) + 1))
    assert train.main(words(files, moved, "--train.steps", "20", "--resume")) == 0
    np.testing.assert_allclose(np.asarray(losses(moved)), np.asarray(losses(whole)), rtol=1e-4)
    results = [json.loads((run / "results.json").read_text())["test"]["soft_prompt"] for run in (whole, moved)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


def test_whole_job_with_data_and_tensor_axes(files: Path, whole: Path, tmp_path: Path):
    """Validation, comparison and results too; and on it goes with what a run of one process left."""
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    for path in (moved / "checkpoints" / "20", moved / "results.json"):
        os.rename(path, tmp_path / path.name)
    ends = two(files, moved, "--mesh.data", "4", "--mesh.tensor", "2", "--resume")
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2]
    np.testing.assert_allclose(np.asarray(losses(moved)), np.asarray(losses(whole)), rtol=1e-4)
    one, both = (json.loads((run / "results.json").read_text()) for run in (whole, moved))
    for prompt in ("soft_prompt", "hard_prompt", "no_prompt"):
        assert one["test"][prompt]["accuracy"] == both["test"][prompt]["accuracy"]
        assert one["test"][prompt]["loss"] == pytest.approx(both["test"][prompt]["loss"], rel=1e-4)


def test_one_failure_ends_all_with_its_reason(files: Path, tmp_path: Path):
    action = "raise ValueError('the second has had enough')"
    (code, _, error), (code_of_second, _, own) = two(
        files, tmp_path / "run", "--mesh.data", "8", action=action, batches=3
    )
    assert code == code_of_second == 1
    assert "error: process 1 failed: ValueError: the second has had enough" in error
    assert "Traceback" in own and "place_and_act" in own


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_vanishes_is_named(files: Path, tmp_path: Path, number: str):
    action = f"os.kill(os.getpid(), signal.{number})"
    (code, _, error), _ = two(files, tmp_path / "run", "--mesh.data", "8", action=action, batches=3)
    assert code == 1
    assert "error: process 1 has sent no heartbeat for 5 s" in error and "--resume" in error
    assert "Traceback" not in error and "stack trace" not in error


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 1.0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    messages = {}

    def come(index: int) -> None:
        try:
            rendezvous.meet(address, 4, index)
        except ConfigError as error:
            messages[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in (2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(messages.values()) == {"of 4 processes, these did not join: 1, 3"} and set(messages) == {0, 2}
    come(1)
    assert messages[1].startswith(f"process 0 did not answer at {address}")
    for wrong in ("localhost", "localhost:port"):
        with pytest.raises(ConfigError, match="it must be HOST:PORT"):
            rendezvous.meet(wrong, 2, 0)


def test_processes_that_disagree(files: Path, tmp_path: Path):
    only = ("--train.batch-size", "16", "--train.seed", "3")
    (code, _, error), (code_of_second, _, own) = two(files, tmp_path / "run", "--mesh.data", "8", only=only)
    assert code == code_of_second == 2
    for said in (error, own):
        assert "config.train.batch_size is 8 in process 0, 16 in process 1; config.train.seed is 0" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host:1"}, "--processes.count and --processes.index must be given too"),
        ({"coordinator": "host:1", "count": 2, "index": 2}, "--processes.index is 2; it must be .* below the count, 2"),
        ({"detect": True, "count": 2}, "leave out the other"),
    ],
)
def test_wrong_ways_to_find_the_others(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ProcessesConfig(**fields)


def test_nothing_to_detect(files: Path, tmp_path: Path):
    own = words(files, tmp_path / "run", "--processes.detect")
    ((code, _, error),) = launch(PROGRAM.format(batches=0, action="pass", words=own))
    assert code == 2 and "found no TPU slice, SLURM, Open MPI or Kubernetes job" in error


def test_too_late_to_join(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert jax.device_count() == 8
    flags = ("--processes.coordinator", "localhost:1", "--processes.count", "2", "--processes.index", "1")
    assert train.main(words(files, tmp_path / "run", *flags)) == 2
    assert "this process cannot join the others" in capsys.readouterr().err


def test_one_process_is_the_first():
    assert from_first("anything", lambda: [1, None]) == [1, None]
