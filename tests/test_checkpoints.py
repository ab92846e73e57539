"""Checkpoints give back what was saved, bit for bit, whatever happens to the process, the disk and the files."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.data.batches import plan_batches
from spt_jax.data.streams import training_batches
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from spt_jax.training.checkpoints import Checkpoints, DamagedError
from spt_jax.training.step import TrainState
from tests.disks import small_disk
from tests.examples import HEAD, random_examples

# After one failed read or write, Orbax closes the event loop that TensorStore still wants to tell of the next.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")

OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adafactor": optax.adafactor(0.3, min_dim_size_to_factor=8, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 9))),
    "sgd": optax.sgd(0.1),
}


def trained(
    optimizer: optax.GradientTransformation, *, step: int = 2, length: int = 12, devices: int = 1
) -> TrainState:
    """The state after `step` updates of something, on `devices` devices."""
    params = {"tokens": jax.random.normal(jax.random.key(0), (length, 16))}
    state = optimizer.init(params)
    for i in range(step):
        gradient = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    mesh = make_mesh(MeshConfig(data=devices))
    return jax.device_put(TrainState(jnp.asarray(step, jnp.int32), params, state), replicated(mesh))


def at(state: TrainState, step: int) -> TrainState:
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def zeros(state: TrainState, devices: int = 1) -> TrainState:
    mesh = make_mesh(MeshConfig(data=devices))
    return jax.device_put(jax.tree.map(jnp.zeros_like, state), replicated(mesh))


def assert_same(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape, ours.weak_type) == (theirs.dtype, theirs.shape, False)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("devices", [(1, 1), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_leaf_comes_back_bit_for_bit_on_any_number_of_devices(tmp_path, name, devices):
    state = trained(OPTIMIZERS[name], devices=devices[0])
    like = zeros(state, devices[1])
    everywhere = replicated(make_mesh(MeshConfig(data=devices[1])))
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.save(state, {"next_index": 3}, {"config": {"seed": 1, "lengths": (1, 2)}})
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        restored, data_state, metadata = checkpoints.restore(None, like)
    assert_same(restored, state)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(restored))
    assert (data_state, metadata) == ({"next_index": 3}, {"config": {"seed": 1, "lengths": [1, 2]}})


def test_like_may_be_shapes_alone(tmp_path):
    state = trained(OPTIMIZERS["adam"])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        assert_same(checkpoints.restore(2, like)[0], state)


def test_special_values_survive(tmp_path):
    odd = np.asarray([[np.nan, -0.0, np.inf, 1e-45, np.float32(np.pi), -np.inf]], np.float32)
    odd.view(np.uint32)[0, 0] |= 0x1234  # A NaN with a payload.
    state = TrainState(jnp.asarray(1, jnp.int32), {"tokens": jnp.asarray(odd)}, (jnp.asarray(2.5, jnp.bfloat16),))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {"loss": float("inf")})
        restored, _, metadata = checkpoints.restore(None, state)
    assert_same(restored, state)
    assert metadata == {"loss": float("inf")}


def test_the_state_may_be_donated_right_after_a_save(tmp_path):
    state = trained(OPTIMIZERS["adam"], length=20_000)
    before = jax.tree.map(lambda a: np.array(a), state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        after = jax.block_until_ready(overwrite(state))
        restored, _, _ = checkpoints.restore(2, after)
    assert np.asarray(restored.params["tokens"]).tobytes() == before.params["tokens"].tobytes()


def test_a_save_does_not_wait_for_its_files(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(OPTIMIZERS["adam"], length=100_000), None, {})
        assert not (tmp_path / "2").exists()
        checkpoints.wait()
        assert (tmp_path / "2").exists()


def test_the_stream_of_batches_goes_on_where_it_was(tmp_path):
    examples = random_examples("choices", 30)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=4)
    state = trained(OPTIMIZERS["sgd"])

    stream = training_batches(examples, plan, batch_size=4, seed=5)
    for _ in range(9):  # Beyond the first epoch.
        next(stream)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, stream.get_state(), {})
    following = [next(stream) for _ in range(10)]

    resumed = training_batches(examples, plan, batch_size=4, seed=5)
    with Checkpoints(tmp_path) as checkpoints:
        resumed.set_state(checkpoints.restore(None, state)[1])
    for expected in following:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), expected)


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_last_are_kept(tmp_path):
    state = trained(OPTIMIZERS["sgd"])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.steps()) == (None, [])
        for step in range(1, 8):
            checkpoints.save(at(state, step), {"step": step}, {"name": f"number {step}"})
        assert (checkpoints.latest_step(), checkpoints.steps()) == (7, [6, 7])
        assert checkpoints.metadata(6) == {"name": "number 6"}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are \[6, 7\]"):
            checkpoints.metadata(5)
    assert listing(tmp_path) == ["6", "7"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [6, 7]
        assert checkpoints.restore(6, state)[1] == {"step": 6}
        checkpoints.save(at(state, 8), {"step": 8}, {})
    assert listing(tmp_path) == ["8"]


def test_a_step_is_saved_once(tmp_path):
    state = trained(OPTIMIZERS["adam"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"a": 1}, {"why": "every 2 steps"})
        checkpoints.save(state, {"a": 1}, {"why": "a signal"})
        assert checkpoints.restore(None, state)[2] == {"why": "every 2 steps"}
        other = at(trained(OPTIMIZERS["adam"], step=3), 2)
        for again, data_state in ((other, {"a": 1}), (state, {"a": 2})):
            with pytest.raises(CheckpointError, match="2 already exists, with another state"):
                checkpoints.save(again, data_state, {})
        assert_same(checkpoints.restore(None, state)[0], state)


def test_what_is_no_json_is_refused(tmp_path):
    state = trained(OPTIMIZERS["sgd"])
    with Checkpoints(tmp_path) as checkpoints:
        for data_state, metadata in ((b"state", {}), (None, {"a": jnp.zeros(2)})):
            with pytest.raises(CheckpointError, match="step 2: data state and metadata must be JSON"):
                checkpoints.save(state, data_state, metadata)
        assert checkpoints.steps() == []


def test_an_empty_or_foreign_directory_is_told_apart(tmp_path):
    state = trained(OPTIMIZERS["sgd"])
    with pytest.raises(ConfigError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot hold checkpoints"):
        Checkpoints(tmp_path / "file")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpoints.restore(None, state)
        checkpoints.save(state, None, {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are \[2\]"):
            checkpoints.restore(5, state)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "weights").write_text("something else")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="7: damaged, or not a checkpoint of this library"):
            checkpoints.restore(None, state)
        assert_same(checkpoints.restore(2, state)[0], state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trained(OPTIMIZERS["sgd"]), r"train/optimizer_state/0/count is int32\[\] in the .*, absent in"),
        (
            lambda: trained(OPTIMIZERS["adam"], length=5),
            r"prompt/tokens is float32\[12, 16\] in the checkpoint, float32\[5, 16\] in this run",
        ),
        (
            lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim else a, trained(OPTIMIZERS["adam"])),
            r"prompt/tokens is float32\[12, 16\] in the checkpoint, bfloat16\[12, 16\] in this run",
        ),
    ],
    ids=["optimizer", "length", "dtype"],
)
def test_a_state_of_another_structure_is_refused(tmp_path, other, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(OPTIMIZERS["adam"]), None, {})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(None, other())


@pytest.mark.parametrize("metadata", [None, {"standings": []}])
def test_metadata_that_were_changed_are_damage(tmp_path, metadata):
    """Also where only they are read, to see which kind of checkpoint it is."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trained(OPTIMIZERS["sgd"]), None, {"best": {"metrics": None}})
        checkpoints.wait()
        path = tmp_path / "2" / "_CHECKPOINT_METADATA"
        content = json.loads(path.read_text())
        content["custom_metadata"]["metadata"] = metadata
        path.write_text(json.dumps(content))
        with pytest.raises(DamagedError, match="2: damaged: its metadata differ"):
            checkpoints.metadata(2)


def test_an_unknown_format_version_is_refused(tmp_path):
    state = trained(OPTIMIZERS["sgd"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        checkpoints.wait()
        path = tmp_path / "2" / "_CHECKPOINT_METADATA"
        content = json.loads(path.read_text())
        content["custom_metadata"]["format"] = 2
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="2: format version 2 is unknown; this library knows 1"):
            checkpoints.restore(None, state)


def test_no_damage_to_any_file_gives_another_state(tmp_path):
    state = trained(OPTIMIZERS["adam"])
    saved = ({"next_index": 7}, {"config": {"seed": 1}})
    random = np.random.default_rng(0)
    refused = named = 0
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, *saved)
        checkpoints.wait()
        for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
            content = file.read_bytes()
            flipped = bytearray(content)
            flipped[random.integers(len(content))] ^= 1 << random.integers(8)
            for damaged in (bytes(flipped), content[: len(content) // 2], None):
                if damaged is None:
                    file.unlink()
                else:
                    file.write_bytes(damaged)
                try:
                    restored, *rest = checkpoints.restore(2, state)
                except CheckpointError as error:
                    refused += 1
                    named += str(tmp_path / "2") in str(error)
                else:  # Orbax writes some files that nothing depends on.
                    assert_same(restored, state)
                    assert tuple(rest) == saved
                file.write_bytes(content)
        assert_same(checkpoints.restore(2, state)[0], state)
    assert refused == named > 10


def test_a_flipped_bit_in_an_array_is_noticed(tmp_path):
    state = trained(OPTIMIZERS["sgd"], length=500)
    raw = np.asarray(state.params["tokens"]).tobytes()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        checkpoints.wait()
        # Random floats hardly compress, so that most of the one large file is their bits.
        file = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        assert file.stat().st_size > 0.8 * len(raw)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="2: damaged"):
            checkpoints.restore(None, state)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, os.getcwd())
    from tests.test_checkpoints import OPTIMIZERS, at, trained
    from spt_jax.training.checkpoints import Checkpoints

    directory = Path(sys.argv[1])
    checkpoints = Checkpoints(directory)
    small = trained(OPTIMIZERS["adam"])
    checkpoints.save(at(small, 1), {"step": 1}, {})
    checkpoints.save(at(trained(OPTIMIZERS["adam"], length=400_000), 2), {"step": 2}, {})
    while not (directory / "2").exists():
        if any(files for name in os.listdir(directory) if name != "1" for _, _, files in os.walk(directory / name)):
            break
    os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert "1" in listing(tmp_path)
    assert "2" not in listing(tmp_path)
    assert len(listing(tmp_path)) == 2, "the killed save left no trace: it was not killed while it wrote"
    state = trained(OPTIMIZERS["adam"])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, data_state, _ = checkpoints.restore(None, state)
        assert_same(restored, at(state, 1))
        assert data_state == {"step": 1}
        checkpoints.save(at(state, 2), {"step": 2}, {})
    assert listing(tmp_path) == ["1", "2"]


def check_that_a_failed_save_loses_nothing(directory: Path) -> None:
    small, large = trained(OPTIMIZERS["adam"]), trained(OPTIMIZERS["adam"], length=100_000)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(at(small, 1), None, {})
        checkpoints.save(at(small, 2), None, {})
        checkpoints.save(at(large, 3), None, {})
        message = r"3: the checkpoint was not saved \(the disk is full.*of step 2 is intact"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(None, small)[0], at(small, 2))
        checkpoints.save(at(small, 3), None, {})
        checkpoints.save(at(small, 4), None, {})
        assert checkpoints.steps() == [3, 4]
    assert listing(directory) == ["3", "4"]
    with pytest.raises(CheckpointError, match="5: the checkpoint was not saved"), Checkpoints(directory) as checkpoints:
        checkpoints.save(at(large, 5), None, {})
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_step() == 4


def test_a_file_size_limit_while_saving_is_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        check_that_a_failed_save_loses_nothing(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(tmp_path):
    with small_disk(tmp_path / "disk", 4_000_000) as disk:
        check_that_a_failed_save_loses_nothing(disk / "checkpoints")
