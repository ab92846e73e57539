"""Work directories, data, prompts, bases and banks on S3 (moto's server): the same results as on a local disk."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

import spt_jax
import train
from spt_jax.__main__ import main
from spt_jax.commands.program import COMMANDS
from spt_jax.commands.serve import Serve
from spt_jax.commands.serve import start as start_service
from spt_jax.data.sources import read_records
from spt_jax.errors import ConfigError, RemoteError, WriteError
from spt_jax.experiment.workdir import _CONFIG_KEYS as CONFIG_KEYS
from spt_jax.experiment.workdir import check_workdir, held
from spt_jax.prompts.storage import INFO_FILE, PARAMS_FILE, read_prompt
from spt_jax.prompts.writing import write_directory
from spt_jax.runtime import extras, mirror, remote
from spt_jax.runtime.files import write_json, write_text
from spt_jax.runtime.mirror import MARKER, leased, staged
from spt_jax.training import single
from tests.jobs import ROOT, arrays, losses, write_task
from tests.remote import s3_server

FLAGS = {
    "--method.length": 4,
    "--data.prompt": r"<soft>{text}\n",
    "--data.target": "{label}",
    "--train.steps": 8,
    "--train.batch-size": 8,
    "--train.evaluate-every": 4,
    "--train.checkpoint-every": 4,
}


def words(files: str | Path, workdir: str | Path, *more: str) -> list[str]:
    """A job with little to compile: only training data."""
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", f"{files}/model"]
    line += ["--data.train", f"{files}/train.jsonl"]
    line += [word for name, value in FLAGS.items() for word in (name, str(value))]
    return [*line, "--data.verbalizers", "good=H", "bad=L", *more]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remote.CACHE, str(tmp_path_factory.mktemp("cache")))
        with s3_server(patch) as files:
            yield files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


def download(s3: fsspec.AbstractFileSystem, path: str, folder: Path) -> Path:
    s3.get(f"{path}/", f"{folder}/", recursive=True)
    return folder


@pytest.fixture(scope="module")
def finished(s3: fsspec.AbstractFileSystem, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of s3://bucket/run, whose data and base are on S3 too.

    s3://bucket/killed is as it was before step 7, after the save at step 4: what SIGKILL would have left then.
    """
    s3.put(f"{files}/", "bucket/task/", recursive=True)
    place, calls = single.place_batch, []

    def place_and_copy(batch, mesh):
        calls.append(1)
        if len(calls) == 7:
            s3.copy("bucket/run/", "bucket/killed/", recursive=True)
        return place(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "place_batch", place_and_copy)
        assert train.main(words("s3://bucket/task", "s3://bucket/run")) == 0
    return download(s3, "bucket/run", tmp_path_factory.mktemp("runs") / "whole")


def names(workdir: Path) -> set[str]:
    """What a work directory holds, without the files inside checkpoints, whose names are random."""
    paths = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return {str(Path(*path.parts[:2])) for path in paths}


def test_a_killed_run_is_resumed_from_s3_to_the_same_end(s3, finished, tmp_path, capsys):
    """The lease of the killed process, which has not expired, does not prevent it."""
    left = s3.find("bucket/killed")
    assert "bucket/killed/checkpoints/4/_CHECKPOINT_METADATA" in left
    assert not any("results.json" in name or "/checkpoints/8/" in name for name in left)
    lease = json.loads(s3.cat_file(f"bucket/killed/{MARKER}"))
    assert lease["pid"] == os.getpid() and lease["until"] > time.time() - 60
    with subprocess.Popen(["true"]) as ended:
        pass
    lease |= {"pid": ended.pid, "until": time.time() + 60}
    s3.pipe_file(f"bucket/killed/{MARKER}", json.dumps(lease).encode())
    job = words("s3://bucket/task", "s3://bucket/killed")
    assert train.main(job) == 2
    assert "work directory s3://bucket/killed already exists" in capsys.readouterr().err
    assert train.main([*job, "--resume"]) == 0
    assert "s3://bucket/killed/prompt: the soft prompt" in capsys.readouterr().out
    resumed = download(s3, "bucket/killed", tmp_path / "resumed")
    assert losses(resumed) == losses(finished) and len(losses(resumed)) == 8
    assert arrays(resumed).tobytes() == arrays(finished).tobytes()
    assert names(resumed) == names(finished) >= {
        MARKER, "checkpoints/4", "checkpoints/8", "config.json", "metrics.jsonl", "predictions.jsonl",
        "prompt/prompt.json", "prompt/prompt.safetensors", "results.json",
    }  # fmt: skip
    assert "until" not in json.loads((resumed / MARKER).read_text())
    config = json.loads((resumed / "config.json").read_text())
    assert config["data"]["train"] == "s3://bucket/task/train.jsonl"
    assert read_prompt("s3://bucket/killed/prompt").info["base"]["id"] == "s3://bucket/task/model"


def test_a_sweep_on_s3(s3, files, tmp_path, capsys):
    short = ("--train.steps", "4", "--train.evaluate-every", "2", "--train.checkpoint-every", "2")
    job = words(files, "s3://bucket/sweep", *short, "--seeds", "0", "1")
    job += ["--data.validation", str(files / "validation.jsonl")]
    assert main(["sweep", *job]) == 0
    assert "s3://bucket/sweep/prompt is from trial" in capsys.readouterr().out
    left = download(s3, "bucket/sweep", tmp_path / "sweep")
    chosen = json.loads((left / "results.json").read_text())["chosen"]["trial"]
    np.testing.assert_array_equal(arrays(left), arrays(left / "trials" / f"{chosen:03d}"))
    lines = (left / "trials.jsonl").read_text().splitlines()
    s3.rm_file("bucket/sweep/results.json")
    s3.pipe_file("bucket/sweep/trials.jsonl", (lines[0] + "\n").encode())
    assert main(["sweep", *job, "--resume"]) == 0
    assert "2 trials, 1 of them done" in capsys.readouterr().out
    assert s3.cat_file("bucket/sweep/trials.jsonl").decode().splitlines() == lines
    assert s3.exists("bucket/sweep/results.json")


@pytest.fixture(scope="module")
def bank(finished: Path, s3) -> str:
    for name in ("first", "second"):
        s3.put(f"{finished}/prompt/", f"bucket/bank/{name}/", recursive=True)
    return "s3://bucket/bank"


def test_a_bank_on_s3_is_served_and_read_again(s3, files, finished, bank, tmp_path):
    service = start_service(Serve(base=str(files / "model"), prompts=Path(bank), slots=2, context=32), tmp_path)
    try:
        assert service.bank.names == ["first", "second"]
        s3.put(f"{finished}/prompt/", "bucket/bank/third/", recursive=True)
        service.load("third")
        assert service.bank.names == ["first", "second", "third"]
        s3.rm("bucket/bank/first", recursive=True)
        with pytest.raises(spt_jax.errors.SptError, match="no prompt directory 'first'"):
            service.load("first")
    finally:
        service.worker.stop()
        s3.rm("bucket/bank/third", recursive=True)


def test_prompts_on_s3_are_named_by_their_urls(s3, files, finished, bank, capsys):
    """By every command that reads a prompt; output may be remote as well."""
    prompt, data = f"{bank}/second", str(files / "test.jsonl")
    assert main(["generate", "--prompt", str(finished / "prompt"), "a good"]) == 0
    answer = capsys.readouterr().out
    assert main(["generate", "--prompt", prompt, "a good"]) == 0
    assert capsys.readouterr().out == answer
    assert main(["evaluate", "--prompt", prompt, "--data", data, "--output", "s3://bucket/out/scores.json"]) == 0
    assert json.loads(s3.cat_file("bucket/out/scores.json"))["soft_prompt"]["examples"] == 30
    assert main(["similar", "--prompt", prompt, "--bank", bank]) == 0
    assert "1.0000  s3://bucket/bank/second" in capsys.readouterr().out
    method = spt_jax.PromptTuning(length=4, init=spt_jax.init.prompt(prompt))
    base = spt_jax.load_base(files / "model")
    np.testing.assert_array_equal(method.init_params(jax.random.key(0), base)["tokens"], arrays(finished))
    assert main(["inspect", "--offline", "--prompt", "s3://bucket/bank/third"]) == 1
    assert "s3://bucket/bank/third: no such file or directory" in capsys.readouterr().err


def test_a_saved_prompt_on_s3_is_replaced(s3, finished):
    """By way of a complete copy, which readers prefer; other files are not replaced."""
    first = {name: (finished / "prompt" / name).read_bytes() for name in (PARAMS_FILE, INFO_FILE)}
    info = json.loads(first[INFO_FILE])
    second = {PARAMS_FILE: first[PARAMS_FILE], INFO_FILE: json.dumps({**info, "extra": {"second": True}}).encode()}
    for content in (first, second):
        write_directory("s3://bucket/saved/prompt", content)
        assert s3.find("bucket/saved") == [f"bucket/saved/prompt/{name}" for name in sorted(content)]
    assert read_prompt("s3://bucket/saved/prompt").info["extra"] == {"second": True}
    # A replacement that was cut off after the first of two copies, and in it.
    s3.pipe_file(f"bucket/saved/.prompt.new/{PARAMS_FILE}", first[PARAMS_FILE])
    assert read_prompt("s3://bucket/saved/prompt").info["extra"] == {"second": True}
    s3.pipe_file(f"bucket/saved/.prompt.new/{INFO_FILE}", first[INFO_FILE])
    assert read_prompt("s3://bucket/saved/prompt").info == info
    s3.pipe_file("bucket/saved/thesis/notes.txt", b"years of work")
    with pytest.raises(WriteError, match=r"holds 'notes.txt', so it is not a directory to replace"):
        write_directory("s3://bucket/saved/thesis", first)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/run", r"s3://bucket/run needs s3fs, which is not installed: pip install 'spt_jax\[s3\]'"),
        ("gs://bucket/run", r"gs://bucket/run needs gcsfs, which is not installed: pip install 'spt_jax\[gs\]'"),
        ("s4://bucket/run", "s4://bucket/run: .*s4"),
        ("file:///tmp/run", "give the path itself"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(files, monkeypatch, capsys, tmp_path, path, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras, "installed", lambda module: module not in ("s3fs", "gcsfs"))
    monkeypatch.setattr("spt_jax.commands.train.load_experiment", lambda config: pytest.fail("loaded"))
    for words_ in (words(files, path), words(files, "out", "--data.test", path)):
        assert train.main(words_) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_the_compilation_cache_is_local(files, capsys):
    assert train.main(words(files, "out", "--compilation-cache", "gs://bucket/cache")) == 2
    assert "the compilation cache gs://bucket/cache is remote" in capsys.readouterr().err


def test_the_commands_of_the_page_exist():
    page = (ROOT / "docs" / "remote.md").read_text()
    assert (
        set(re.findall(r"^spt-jax (\S+)", page, re.MULTILINE)) == {"train", "generate", "push", "pull"} < set(COMMANDS)
    )


def test_several_processes_need_a_shared_directory(files, capsys):
    more = ("--processes.coordinator", "localhost:1", "--processes.count", "2", "--processes.index", "0")
    assert train.main(words(files, "s3://bucket/shared", *more)) == 2
    assert "work directory s3://bucket/shared is remote, which works in a run of one process" in capsys.readouterr().err


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch):
    """A remote file system in this process: that of memory://."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def stored(memory: fsspec.AbstractFileSystem) -> dict[str, bytes]:
    return {name.removeprefix("/run/"): memory.cat_file(name) for name in memory.find("/run")}


def write_prompt(workdir: Path, content: bytes) -> None:
    write_directory(workdir / "prompt", {PARAMS_FILE: content, INFO_FILE: content})


def test_only_complete_files_are_uploaded(memory):
    with staged(Path("memory://run")) as workdir, leased(workdir):
        (workdir / ".config.json.tmp").write_text("{")
        (workdir / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir(parents=True)
        (workdir / "checkpoints" / "4.orbax-checkpoint-tmp-1" / "array").write_text("half")
        write_json(workdir / "config.json", {})
        assert set(stored(memory)) == {MARKER, "config.json"}
        write_prompt(workdir, b"1")
        assert set(stored(memory)) == {MARKER, "config.json", "prompt/prompt.json", "prompt/prompt.safetensors"}
        (workdir / "config.json").unlink()
    assert set(stored(memory)) == {MARKER, "prompt/prompt.json", "prompt/prompt.safetensors"}


@pytest.mark.parametrize("count", range(14))
def test_a_cut_off_upload_leaves_the_last_good_state(memory, monkeypatch, count):
    """After any number of puts and removals, a reader finds one of the two prompts and whole checkpoints only."""

    def checkpoint(workdir: Path, step: int) -> None:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        for name in ("_CHECKPOINT_METADATA", "array"):
            (workdir / "checkpoints" / str(step) / name).write_text(str(step))

    with staged(Path("memory://run")) as workdir, leased(workdir):
        checkpoint(workdir, 2)
        write_prompt(workdir, b"2")
    left = count

    def limited(change):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("the connection is lost")
            return change(*args, **kwargs)

        return run

    with staged(Path("memory://run")) as workdir, contextlib.suppress(WriteError), leased(workdir):
        monkeypatch.setattr(type(memory), "put_file", limited(type(memory).put_file))
        monkeypatch.setattr(type(memory), "rm_file", limited(type(memory).rm_file))
        checkpoint(workdir, 4)
        shutil.rmtree(workdir / "checkpoints" / "2")
        write_prompt(workdir, b"4")
    monkeypatch.undo()
    with staged(Path("memory://run")) as workdir:
        prompt = {(workdir / "prompt" / name).read_bytes() for name in (PARAMS_FILE, INFO_FILE)}
        assert len(prompt) == 1 and prompt < {b"2", b"4"}
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert steps in ([2], [2, 4], [4])
        assert all(len(list((workdir / "checkpoints" / str(step)).iterdir())) == 2 for step in steps)
        with leased(workdir):
            pass  # which completes the upload
        assert not [name for name in stored(memory) if ".new" in name]
        assert {name: (workdir / name).read_bytes() for name in stored(memory) if name != MARKER} == {
            name: content for name, content in stored(memory).items() if name != MARKER
        }


def test_a_second_process_is_refused_while_the_first_has_the_lease(memory):
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(program) as other:
        lease = {"pid": other.pid, "host": socket.gethostname(), "token": "other", "until": time.time() + 60}
        memory.pipe_file("/run/config.json", b"{}")
        memory.pipe_file(f"/run/{MARKER}", json.dumps(lease).encode())
        with staged(Path("memory://run")) as workdir:
            with pytest.raises(ConfigError, match=f"memory://run is in use by process {other.pid} on .*expires in"):
                check_workdir(workdir, resume=True, overwrite=False)
            with pytest.raises(ConfigError, match="is in use"), held(workdir):
                pass
            other.kill()
            other.wait()
            check_workdir(workdir, resume=True, overwrite=False)
    for change, free in (({"host": "elsewhere"}, False), ({"host": "elsewhere", "until": time.time() - 1}, True)):
        memory.pipe_file(f"/run/{MARKER}", json.dumps({**lease, **change}).encode())
        refused = contextlib.nullcontext() if free else pytest.raises(ConfigError, match="on elsewhere")
        with staged(Path("memory://run")) as workdir, refused, held(workdir):
            assert json.loads(memory.cat_file(f"/run/{MARKER}"))["pid"] == os.getpid()
    assert "until" not in json.loads(memory.cat_file(f"/run/{MARKER}"))


def test_a_lost_lease_ends_the_run(memory, monkeypatch):
    monkeypatch.setattr(mirror, "LEASE_SECONDS", 0.03)
    with staged(Path("memory://run")) as workdir:
        lost = pytest.raises(WriteError, match="another process has taken over the work directory memory://run")
        with lost, leased(workdir):
            memory.pipe_file(f"/run/{MARKER}", b'{"token": "other"}')
            time.sleep(0.2)
            write_text(workdir / "results.json", "{}")
    assert set(stored(memory)) == {MARKER} and b"other" in stored(memory)[MARKER]


@pytest.mark.parametrize("reads", ["memory://run/data.jsonl", "memory://run", "memory:/run/deeper/data.jsonl"])
def test_overwrite_refuses_a_remote_directory_that_the_command_reads(memory, reads):
    memory.pipe_file("/run/config.json", json.dumps(dict.fromkeys(CONFIG_KEYS)).encode())
    with staged(Path("memory://run")) as workdir:
        with pytest.raises(ConfigError, match=r"memory://run and memory://run.* overlap; give another --workdir"):
            check_workdir(workdir, overwrite=True, reads=[Path(reads)])
        check_workdir(workdir, overwrite=True, reads=[Path("memory://runs/data.jsonl")])


def test_copies_follow_the_remote_version(memory, monkeypatch, tmp_path):
    monkeypatch.setenv(remote.CACHE, str(tmp_path))
    url = "memory://data/train.jsonl"
    for number in range(2):
        memory.pipe_file("/data/train.jsonl", f'{{"text": "{number}"}}\n'.encode())
        assert read_records(url) == [{"text": str(number)}] == read_records(str(Path(url)))
    memory.rm_file("/data/train.jsonl")
    with pytest.raises(RemoteError, match=r"memory://data/train.jsonl: no such file"):
        read_records(url)


def test_fit_in_a_remote_directory_is_fit_in_a_local_one(memory, files, tmp_path):
    base, train = spt_jax.load_base(files / "model"), files / "train.jsonl"
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}")

    def fitted(workdir, **more):
        options = {"steps": 2, "batch_size": 8, "checkpoint_every": 1, "progress": False}
        return spt_jax.fit(base, spt_jax.PromptTuning(length=2), template, train, workdir=workdir, **options, **more)

    with pytest.raises(ConfigError, match="resume"):
        fitted("memory://fit", resume=True)
    result, local = fitted("memory://fit"), fitted(tmp_path / "fit")
    saved, expected = spt_jax.load_prompt("memory://fit/prompt", base), local.prompt.virtual.tokens
    for found in (result.prompt, saved, fitted("memory://fit", resume=True).prompt):
        np.testing.assert_array_equal(found.virtual.tokens, expected)
    with pytest.raises(ConfigError, match="memory://fit already exists"):
        fitted("memory://fit")
