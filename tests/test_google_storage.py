"""Work directories, data, prompts and bases on an emulator of Google Cloud Storage."""

import json
import os
import subprocess
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

import spt_jax
import train
from spt_jax.errors import RemoteError
from spt_jax.prompts.storage import read_prompt
from spt_jax.runtime import remote
from spt_jax.runtime.mirror import MARKER
from spt_jax.training import single
from tests.jobs import ROOT, arrays, losses, write_task
from tests.remote import gs_server

STEPS = ("--train.steps", "8", "--train.batch-size", "8", "--train.checkpoint-every", "4")
TEMPLATE = ("--method.length", "4", "--data.prompt", r"<soft>{text}\n", "--data.target", "{label}")


def words(files: str | Path, workdir: str | Path) -> list[str]:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", f"{files}/model"]
    line += ["--data.train", f"{files}/train.jsonl", *STEPS, *TEMPLATE]
    return [*line, "--data.verbalizers", "good=H", "bad=L"]


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remote.CACHE, str(tmp_path_factory.mktemp("cache")))
        with gs_server(patch) as files:
            yield files


@pytest.fixture(scope="module")
def files(gs: fsspec.AbstractFileSystem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task on the disk and, with its base, in gs://bucket/task."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    gs.put(f"{folder}/", "bucket/task/", recursive=True)
    return folder


@pytest.fixture(scope="module")
def finished(gs: fsspec.AbstractFileSystem, files: Path) -> Path:
    """A copy of gs://bucket/run. gs://bucket/killed is as it was before step 7: what SIGKILL would have left."""
    place, calls = single.place_batch, []

    def place_and_copy(batch, mesh):
        calls.append(1)
        if len(calls) == 7:
            for name in gs.find("bucket/run"):
                gs.pipe_file(name.replace("bucket/run/", "bucket/killed/"), gs.cat_file(name))
        return place(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "place_batch", place_and_copy)
        assert train.main(words("gs://bucket/task", "gs://bucket/run")) == 0
    folder = files.parent / "whole"
    gs.get("bucket/run/", f"{folder}/", recursive=True)
    return folder


def test_a_killed_run_is_resumed_from_google_storage_to_the_same_end(gs, finished, tmp_path, capsys):
    left = gs.find("bucket/killed")
    assert "bucket/killed/checkpoints/4/_CHECKPOINT_METADATA" in left
    assert not any("results.json" in name or "/checkpoints/8/" in name for name in left)
    lease = json.loads(gs.cat_file(f"bucket/killed/{MARKER}"))
    assert lease["pid"] == os.getpid() and lease["until"] > time.time() - 60
    with subprocess.Popen(["true"]) as ended:
        pass
    gs.pipe_file(f"bucket/killed/{MARKER}", json.dumps({**lease, "pid": ended.pid, "until": time.time() + 60}).encode())
    job = words("gs://bucket/task", "gs://bucket/killed")
    assert train.main(job) == 2
    assert "work directory gs://bucket/killed already exists" in capsys.readouterr().err
    assert train.main([*job, "--resume"]) == 0
    assert "gs://bucket/killed/prompt: the soft prompt" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    gs.get("bucket/killed/", f"{resumed}/", recursive=True)
    assert losses(resumed) == losses(finished) and len(losses(resumed)) == 8
    assert arrays(resumed).tobytes() == arrays(finished).tobytes()
    assert "until" not in json.loads((resumed / MARKER).read_text())


def test_a_prompt_on_google_storage_is_loaded_with_its_base(gs, finished, tmp_path):
    assert read_prompt("gs://bucket/run/prompt").info["base"]["id"] == "gs://bucket/task/model"
    prompt = spt_jax.load_prompt("gs://bucket/run/prompt")
    np.testing.assert_array_equal(prompt.virtual.tokens, arrays(finished).reshape(prompt.virtual.tokens.shape))
    prompt.save("gs://bucket/saved/prompt")
    assert {name.rpartition("/")[2] for name in gs.find("bucket/saved")} == {"prompt.json", "prompt.safetensors"}
    with pytest.raises(RemoteError, match="gs://bucket/nothing"):
        remote.local_copy("gs://bucket/nothing/prompt")
