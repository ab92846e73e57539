"""A directory of prompts is followed, whatever becomes of it; replicas behind Ray Serve follow it too, where Ray is."""

import asyncio
import concurrent.futures
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

import spt_jax
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.folder import Changes, FolderWatch, follow, marks
from spt_jax.serving.service import Service
from spt_jax.serving.worker import Worker
from spt_jax.testing import write_tiny_checkpoint
from tests.serving.conftest import save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service(base, tmp_path):
    return Service(Worker(Engine(PromptBank(base), slots=1)), "tiny", tmp_path)


@pytest.fixture
def watch(service):
    return FolderWatch(service)


def test_new_changed_and_removed_prompts_are_taken_over(base, service, watch, tmp_path):
    save(tmp_path / "a", base, "front")
    save(tmp_path / "b", base, "front", seed=2)
    assert watch.look() == Changes(loaded=("a", "b"))
    assert watch.look() == Changes()

    before = {name: service.bank.entry(name) for name in ("a", "b")}
    save(tmp_path / "a", base, "front", seed=1)
    save(tmp_path / "c", base, "end")
    assert watch.look() == Changes(loaded=("a", "c"))
    assert service.bank.entry("a") is not before["a"] and service.bank.entry("b") is before["b"]

    shutil.rmtree(tmp_path / "b")
    assert watch.look() == Changes() and "b" in service.bank.names
    assert watch.look() == Changes(removed=("b",))
    assert watch.look() == Changes() and service.bank.names == ["a", "c"]

    save(tmp_path / "b", base, "front")
    assert watch.look() == Changes(loaded=("b",))


@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_a_damaged_prompt_leaves_the_last_good_one(base, service, watch, tmp_path, damage):
    save(tmp_path / "front", base, "front")
    watch.look()
    before = service.bank.entry("front")
    tensors = tmp_path / "front" / "prompt.safetensors"
    content = tensors.read_bytes()
    if damage is None:
        tensors.write_bytes(content[:-4] + b"damn")
    else:
        (tmp_path / "front" / "prompt.json").write_bytes(damage)
    save(tmp_path / "more", base, "front", seed=3)

    changes = watch.look()
    assert changes.loaded == ("more",) and list(changes.refused) == ["front"]
    assert watch.look() == Changes(), "old news"
    assert service.bank.entry("front") is before

    shutil.rmtree(tmp_path / "front")
    save(tmp_path / "front", base, "front", seed=1)
    assert watch.look() == Changes(loaded=("front",))
    assert service.bank.entry("front") is not before


def test_a_prompt_that_comes_file_by_file_is_read_when_it_is_whole(base, service, watch, tmp_path):
    save(tmp_path / ".elsewhere", base, "front")
    assert watch.look() == Changes()
    (tmp_path / "front").mkdir()
    for name in ("prompt.json", "prompt.safetensors"):
        assert "front" in watch.look().refused
        shutil.copy(tmp_path / ".elsewhere" / name, tmp_path / "front" / name)
    assert watch.look() == Changes(loaded=("front",))


def test_a_save_under_way_removes_nothing(base, service, watch, tmp_path):
    save(tmp_path / "front", base, "front")
    watch.look()
    for _ in range(2):
        os.rename(tmp_path / "front", tmp_path / ".front.old")
        assert watch.look() == Changes()
        os.rename(tmp_path / ".front.old", tmp_path / "front")
        assert watch.look() == Changes()
    assert service.bank.names == ["front"]


def test_a_change_within_one_tick_of_a_coarse_clock_is_seen(base, watch, tmp_path):
    for seed in (0, 1):
        save(tmp_path / "front", base, "front", seed)
        for path in (tmp_path / "front").iterdir():
            os.utime(path, (1, 1))
        assert watch.look() == Changes(loaded=("front",))


def test_a_file_that_cannot_be_read_hides_no_change_of_others(base, watch, tmp_path):
    save(tmp_path / "front", base, "front")
    (tmp_path / "front" / "notes").symlink_to(tmp_path / "front" / "nothing")
    assert watch.look() == Changes(loaded=("front",))
    assert watch.look() == Changes()
    (tmp_path / "front" / "prompt.json").write_text("{")
    assert "front" in watch.look().refused


def test_what_is_no_prompt_is_refused_by_name(base, service, watch, tmp_path, tmp_path_factory):
    save(tmp_path / "tiny", base, "front")
    (tmp_path / "no name").mkdir()
    (tmp_path / "out").symlink_to(tmp_path_factory.mktemp("out"))
    (tmp_path / "notes.txt").write_text("no directory")
    refused = watch.look().refused
    assert list(refused) == ["no name", "out", "tiny"]
    assert "cannot name a prompt" in refused["tiny"] and service.bank.names == []


def test_a_prompt_whose_programs_do_not_compile_is_tried_again(base, service, watch, tmp_path, monkeypatch):
    save(tmp_path / "front", base, "front")
    monkeypatch.setattr(service, "warm", lambda name: 1 / 0)
    assert watch.look() == Changes(refused={"front": "division by zero"})
    monkeypatch.undo()
    assert watch.look() == Changes(loaded=("front",))


def test_prompts_that_were_read_before_are_not_read_again(base, service, tmp_path):
    save(tmp_path / "front", base, "front")
    seen = marks(tmp_path)
    service.load("front")
    watch = FolderWatch(service, seen)
    assert watch.look() == Changes()
    service.bank.remove("front")
    assert watch.look() == Changes() and service.bank.names == [], "it was removed on purpose"
    shutil.rmtree(tmp_path / "front")
    assert [watch.look(), watch.look()] == [Changes(), Changes(removed=("front",))]


def test_following_outlives_a_share_that_is_away(base, service, watch, tmp_path):
    save(tmp_path / "front", base, "front")
    told = []

    async def run() -> None:
        task = asyncio.create_task(follow(watch, 0.01, told.append))
        for away in (False, True, False):
            if away:
                os.rename(tmp_path, tmp_path.with_name("away"))
            elif not tmp_path.exists():
                os.rename(tmp_path.with_name("away"), tmp_path)
                save(tmp_path / "more", base, "front", seed=3)
            count = len(told)
            while len(told) == count:
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), 60))
    assert told[0] == "loaded prompt 'front'" and told[-1] == "loaded prompt 'more'"
    assert set(told[1:-1]) == {told[1]} and "the prompts are unchanged" in told[1]
    assert service.bank.names == ["front", "more"]


class Cluster:
    """Two replicas behind Ray's proxy."""

    def __init__(self, ray, serve, url: str, prompts: Path, base):
        self.ray, self.serve, self.url, self.prompts, self.base = ray, serve, url, prompts, base
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)

    def text(self, model: str, length: int = 24) -> str:
        asked = {"model": model, "prompt": "a question", "max_tokens": length, "seed": 1}
        return self.client.completions.create(**asked).choices[0].text

    def names(self) -> tuple[str, ...]:
        return tuple(model.id for model in self.client.models.list())

    def everywhere(self, ask) -> set:
        """What comes back when many ask at the same time, so that every replica is asked."""
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return set(pool.map(lambda _: ask(), range(32)))

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def running(self) -> bool:
        """Whether both replicas take requests."""
        found = self.serve.status().applications["spt_jax"].deployments.get("spt_jax")
        return found is not None and found.status == "HEALTHY" and found.replica_states == {"RUNNING": 2}

    def replicas(self) -> set[str]:
        named = self.ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA")}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for own in found:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in found]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Ray reads these when it is imported: nobody else may use this cluster, and nothing is reported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
    import yaml
    from ray import serve

    folder = tmp_path_factory.mktemp("cluster")
    base = spt_jax.load_base(str(write_tiny_checkpoint(folder / "tiny")))
    save(folder / "prompts" / "front", base, "front")
    (folder / "prompts" / "broken").mkdir()
    ports = free_ports(3)
    config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
    config["http_options"]["port"] = ports[0]
    (application,) = config["applications"]
    application["args"] |= {"base": str(folder / "tiny"), "prompts": str(folder / "prompts"), "slots": 1, "queue": 2}
    application["deployments"][0]["user_config"]["watch_seconds"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    own = ["--head", "--block", f"--port={ports[1]}", f"--ray-client-server-port={ports[2]}", "--num-cpus=2"]
    own += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=80000000"]
    head = subprocess.Popen([sys.executable, "-m", "ray.scripts.scripts", "start", *own], cwd=ROOT)
    try:
        address = f"127.0.0.1:{ports[1]}"
        run = ["ray.serve.scripts", "run", "--non-blocking", "--address", address, str(folder / "config.yaml")]
        subprocess.run([sys.executable, "-m", *run], cwd=ROOT, check=True, timeout=120)
        ray.init(address=address, log_to_driver=False)
        found = Cluster(ray, serve, f"http://127.0.0.1:{ports[0]}", folder / "prompts", base)
        found.wait(found.running)
        yield found
        serve.shutdown()
    finally:
        ray.shutdown()
        head.terminate()
        head.wait(60)


def test_replicas_answer_alike(cluster):
    assert len(cluster.replicas()) == 2
    assert cluster.everywhere(cluster.names) == {("tiny", "front")}
    assert len(cluster.everywhere(lambda: cluster.text("front"))) == 1
    assert cluster.text("front") != cluster.text("tiny")


def test_streams_pass_the_proxy_as_they_grow(cluster):
    asked = {"model": "front", "prompt": "a question", "max_tokens": 80, "seed": 1}
    pieces = [event.choices[0] for event in cluster.client.completions.create(**asked, stream=True)]
    assert len(pieces) > 5 and "".join(piece.text for piece in pieces) == cluster.text("front", 80)


def test_errors_pass_the_proxy(cluster):
    client = cluster.client.with_options(max_retries=0)

    def ask(_: int) -> openai.RateLimitError | None:
        try:
            client.completions.create(model="tiny", prompt="a question", max_tokens=60, n=3)
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(16) as pool:
        full = [error for error in pool.map(ask, range(16)) if error is not None]
    assert 0 < len(full) < 16
    assert all(error.response.headers["retry-after"] == "1" and error.code == "queue_full" for error in full)
    with pytest.raises(openai.BadRequestError, match="needs 16 answers at once"):
        client.completions.create(model="tiny", prompt="a question", n=16)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a question")
    assert httpx.post(f"{cluster.url}/v1/prompts", json={"name": "front"}).status_code == 403


def test_prompts_come_and_go_everywhere(cluster):
    save(cluster.prompts / "keys", cluster.base, "keys")
    cluster.wait(lambda: cluster.everywhere(cluster.names) == {("tiny", "front", "keys")})
    (before,) = cluster.everywhere(lambda: cluster.text("keys"))

    tensors = cluster.prompts / "keys" / "prompt.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    time.sleep(2)
    assert cluster.everywhere(lambda: cluster.text("keys")) == {before}

    save(cluster.prompts / "keys", cluster.base, "keys", seed=1)
    cluster.wait(lambda: before not in cluster.everywhere(lambda: cluster.text("keys")))
    assert len(cluster.everywhere(lambda: cluster.text("keys"))) == 1

    shutil.rmtree(cluster.prompts / "keys")
    cluster.wait(lambda: cluster.everywhere(cluster.names) == {("tiny", "front")})


def test_a_killed_replica_is_replaced_while_others_answer(cluster):
    before, expected = cluster.replicas(), cluster.text("front")
    killed = min(before)
    cluster.ray.kill(cluster.ray.get_actor(killed, namespace="serve"))

    def replaced() -> bool:
        assert cluster.everywhere(lambda: cluster.text("front")) == {expected}
        return len(cluster.replicas() - {killed}) == 2 and cluster.running()

    cluster.wait(replaced)
    assert cluster.everywhere(lambda: cluster.text("front")) == {expected}


def test_a_replica_whose_engine_has_failed_is_unhealthy(service):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
    from deploy.ray_serve import Replica
    from spt_jax.serving.server import make_app

    replica = Replica()
    replica.app = make_app(service)
    asyncio.run(replica.check_health())
    service.worker.failure = ValueError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(replica.check_health())
