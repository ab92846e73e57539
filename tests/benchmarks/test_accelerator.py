"""accelerator.py: all stages on the CPU in tiny shapes; no failing stage, and no kill, harms the others' results."""

import fcntl
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import STAGES, Stage, run_stages
from benchmarks.accelerator_stages.process import Record, is_out_of_memory
from benchmarks.accelerator_stages.targets import LIMITS, targets
from tests.quick import QUICK_FLAGS

ROOT = Path(__file__).parents[2]
PEFT = all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def stage(name: str, weight: float = 1.0) -> Stage:
    return Stage(f"tests.benchmarks.stages.{name}", weight)


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, Path]:
    """The script's exit code, its report, and its directory: of one run, which all workers of the tests share."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, code = shared / "accelerator", shared / "accelerator-exit-code"
    with open(shared / "accelerator-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not code.exists():
            code.write_text(str(run_tiny(out)))
    return int(code.read_text()), json.loads((out / "accelerator.json").read_text()), out


def run_tiny(out: Path) -> int:
    """Runs the script with `--tiny`; returns its exit code."""
    out.mkdir()
    words = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--tiny", "--out", str(out)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run([*words, "--seconds", "3000"], env=environment, capture_output=True, text=True, cwd=out)
    print(done.stdout, done.stderr)
    return done.returncode


def test_all_stages_pass_on_the_cpu(tiny):
    code, report, _ = tiny
    ended = {name: (own["status"], own.get("error")) for name, own in report["stages"].items()}
    assert ended == dict.fromkeys(STAGES, ("passed", None))
    assert code == 0 and report["status"] == "passed"
    assert report["platform"] == "cpu" and report["versions"]["jax"]
    assert all(target["measured"] is target["met"] is None for target in report["targets"].values())


def test_each_stage_has_its_own_file(tiny):
    _, report, out = tiny
    assert {path.name for path in out.iterdir()} == {
        "accelerator.json", "accelerator.log", *(f"{name}.json" for name in STAGES)
    }  # fmt: skip
    for name in STAGES:
        assert json.loads((out / f"{name}.json").read_text()) == report["stages"][name]


def test_what_tiny_measures(tiny):
    stages = tiny[1]["stages"]
    rows = stages["right"]["rows"]
    assert {row["status"] for name, row in rows.items() if name.startswith("attention")} == {"skipped"}
    assert all(row["status"] == "passed" for name, row in rows.items() if not name.startswith("attention"))
    (ours,) = (row for row in stages["train"]["rows"].values() if row.get("framework") == "spt_jax")
    assert ours["tokens_per_second"] > 0 and 0 < ours["utilization"] < 1 and ours["peak_bytes"] > 0
    served = stages["serve"]["rows"]["spt_jax"]
    assert set(served["tokens_per_second"]) == {"0", "1", "3"} and served["first_token_milliseconds"]["prompt"] > 0
    assert stages["population"]["ratios"]["2 dots"] > 0
    assert set(stages["quickstart"]["accuracy"]) == {"soft_prompt", "hard_prompt", "no_prompt"}


@pytest.mark.parametrize(("name", "row"), [("train", "peft prompt batch 4"), ("serve", "peft")])
def test_parts_that_need_torch_and_peft(tiny, name, row):
    found = tiny[1]["stages"][name]["rows"][row]
    if PEFT:
        assert found["tokens_per_second"] > 0
    else:
        assert found["status"] == "skipped" and found["error"].startswith("needs ")


def test_the_frameworks_compute_the_same(tiny):
    if not PEFT:
        pytest.skip("needs torch and peft")
    (found,) = tiny[1]["stages"]["train"]["comparisons"].values()
    assert found["loss_difference"] < 1e-5


def test_no_stage_ends_the_others(tmp_path, capsys):
    """One raises, one is brought down, one hangs, one lacks a package; each is reported, and the last still passes."""
    names = ("raising", "dying", "hanging", "absent", "steady")
    weights = {"hanging": 0.3}
    stages = {name: stage(name, weights.get(name, 1.0)) for name in names}
    assert run_stages(stages, seconds=50, out=tmp_path, tiny=True) == 1
    report = json.loads((tmp_path / "accelerator.json").read_text())
    found = report["stages"]
    assert {name: own["status"] for name, own in found.items()} == {
        "raising": "failed", "dying": "crashed", "hanging": "out of time", "absent": "skipped", "steady": "passed"
    }  # fmt: skip
    assert report["status"] == "failed"
    assert found["raising"]["error"] == "ValueError: no such measurement"
    assert f"exit code {-signal.SIGABRT}" in found["dying"]["error"] and "driver gave up" in found["dying"]["error"]
    assert found["hanging"]["rows"] == {"first": {"status": "passed"}} and "about to hang" in found["hanging"]["error"]
    assert found["absent"]["error"] == "needs a_package_that_nobody_has"
    wait_until(lambda: gone(found["hanging"]["child"]))
    printed = capsys.readouterr().out.splitlines()
    for name in names:
        assert any(line.startswith(f"{name}: {found[name]['status']} in ") for line in printed)


def test_a_starved_stage_is_reported(tmp_path):
    stages = {"endless": stage("endless", 1.0), "steady": stage("steady", 1e-9)}
    assert run_stages(stages, seconds=6, out=tmp_path, tiny=True) == 1
    found = json.loads((tmp_path / "accelerator.json").read_text())["stages"]
    assert found["endless"]["status"] == found["steady"]["status"] == "out of time"
    assert found["endless"]["rows"] and "no time was left" in found["steady"]["error"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_output_is_valid_after_a_kill_at_a_random_moment(tmp_path, number):
    """Also the file of the stage that was under way, whose process ends too."""
    program = (
        "import sys; from pathlib import Path; from benchmarks.accelerator import *\n"
        "stages = {name: Stage(f'tests.benchmarks.stages.{name}', 1.0) for name in ('steady', 'endless')}\n"
        f"with terminated_as_exit(): run_stages(stages, seconds=600, out=Path({str(tmp_path)!r}), tiny=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: (tmp_path / "endless.json").exists())
        time.sleep(random.uniform(0.0, 0.7))
        parent.send_signal(number)
    report, under_way = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("accelerator", "endless"))
    assert report["stages"]["steady"]["status"] == "passed" and report["status"] == "running"
    if under_way.get("process"):
        wait_until(lambda: gone(under_way["process"]))
    json.loads((tmp_path / "endless.json").read_text())


def test_records_are_json_whatever_is_measured(tmp_path):
    record = Record(tmp_path / "a.json", status="running")
    record.put("rows", "first", {"loss": float("nan"), "losses": [1.0, float("inf")], 3: (True, None)})
    expected = {"status": "running", "rows": {"first": {"loss": None, "losses": [1.0, None], "3": [True, None]}}}
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected


def test_memory_that_runs_out_is_told_from_other_errors():
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("shapes differ"))


def row(framework: str, tokens: float, peak: float, **more) -> dict:
    own = {"status": "passed", "framework": framework, "method": "prompt", "tokens_per_second": tokens}
    return {**own, "peak_bytes": peak, **more}


def test_targets():
    """One configuration has to meet all of a batch size's; what was not measured on hardware is None."""
    rows = {
        "a": row("spt_jax", 170.0, 44.0, batch=32, attention="cudnn", remat="dots", utilization=0.46),
        "b": row("spt_jax", 190.0, 90.0, batch=32, attention="cudnn", remat="none", utilization=0.5),
        "c": row("spt_jax", 130.0, 10.0, batch=4, attention="xla", remat="none", utilization=0.2),
        "peft prompt batch 32": row("peft", 100.0, 100.0, batch=32),
        "peft prompt batch 4": row("peft", 100.0, 20.0, batch=4),
        "spt_jax prompt batch 32 fused full": row("spt_jax", 90.0, 30.0, batch=32, attention="cudnn", remat="full"),
        "peft prompt batch 32 checkpointing": {"status": "out of memory", "batch": 32},
    }
    train = {"platform": "gpu", "memory_bytes": 120.0, "rows": rows}
    serve = {"platform": "gpu", "rows": {"spt_jax": {"share_of_one_prompt": {"1000": 0.99}}}}
    found = targets({"train": train, "serve": serve, "population": {"ratios": {"8 dots": 0.1}, "platform": "cpu"}})
    assert list(found) == list(LIMITS)
    assert {name: (one["measured"], one["met"]) for name, one in found.items()} == {
        "batch 4: tokens/s of PEFT's": (1.3, False),
        "batch 32: tokens/s of PEFT's": (1.7, True),
        "batch 32: peak memory of PEFT's": (0.44, True),
        "batch 32: share of the measured peak": (0.46, True),
        "batch 32: full rematerialisation's peak memory of PEFT's with checkpointing": (0.25, True),
        "1,000 prompts: tokens/s of one prompt's": (0.99, True),
        "1,000 prompts: tokens/s of the bare base's": (None, None),
        "a population of 8: time of eight runs": (None, None),
    }
    assert found["batch 32: tokens/s of PEFT's"]["of"] == "cudnn dots"
    assert (
        "ran out of memory"
        in found["batch 32: full rematerialisation's peak memory of PEFT's with checkpointing"]["of"]
    )


def test_wrong_words(capsys):
    for words in (["--stages", "trian"], ["--seconds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            accelerator.main(words)
