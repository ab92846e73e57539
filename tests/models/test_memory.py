"""Loading a large checkpoint takes little more memory than its parameters."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.checkpoint_writing import write_checkpoint
from spt_jax.bases.config import decoder_config
from spt_jax.testing import tiny_config, write_tiny_checkpoint

SIZES = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}

CHILD = """
import json, sys, threading
import jax
from spt_jax.bases.base import load_base

small, large, dtype, quantize = sys.argv[1:]
quantize = quantize or None

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

load_base(small, dtype=dtype, quantize=quantize)
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
base = load_base(large, dtype=dtype, quantize=quantize)
done.set()
thread.join()
bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
print(json.dumps({"bytes": bytes_, "peak": max(peak, anonymous()) - before}))
"""


def write_large(directory: Path, dtype, **sizes) -> Path:
    """A checkpoint of half a gigabyte in float32, its tensors views of one block of random numbers."""
    write_tiny_checkpoint(directory, **{**sizes, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32})
    hf = tiny_config(**sizes)
    hf.save_pretrained(directory)
    config = decoder_config(hf)
    shapes = parameter_shapes(config)
    block = np.random.default_rng(0).standard_normal(max(leaf.size for leaf in jax.tree.leaves(shapes))).astype(dtype)
    params = jax.tree.map(lambda leaf: block[: leaf.size].reshape(leaf.shape), shapes)
    write_checkpoint(directory, config, params, dtype)
    return directory


def measure(directory: Path, dtype: str, quantize: str = "") -> dict[str, int]:
    """Bytes of the parameters as loaded, and the rise of anonymous memory while they were."""
    small = write_tiny_checkpoint(directory.parent / "small")
    command = [sys.executable, "-c", CHILD, str(small), str(directory), dtype, quantize]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_loading_takes_at_most_1_3_times_the_parameters(tmp_path):
    """Half a gigabyte, float32 to float32: some ten seconds and 0.6 GB of disk."""
    result = measure(write_large(tmp_path / "large", np.float32, **SIZES), "float32")
    assert result["bytes"] > 500e6
    assert result["peak"] <= 1.3 * result["bytes"]
    assert result["peak"] >= 0.9 * result["bytes"], "the parameters themselves were not seen"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_quantizing_takes_at_most_1_3_times_the_quantized_parameters(tmp_path):
    """100 MB at int4, of 200 million weights in bfloat16: 0.4 GB of disk. Whole leaves of floats would take 200 MB."""
    sizes = {"vocab_size": 2_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 48}
    result = measure(write_large(tmp_path / "large", ml_dtypes.bfloat16, **sizes), "bfloat16", "int4")
    assert 100e6 < result["bytes"] < 150e6
    assert 0.9 * result["bytes"] <= result["peak"] <= 1.3 * result["bytes"]


if __name__ == "__main__":
    import tempfile

    for stored, loaded, scale in ((np.float32, "float32", 1), (ml_dtypes.bfloat16, "bfloat16", 2),
                                  (ml_dtypes.bfloat16, "float32", 1), (np.float32, "bfloat16", 2)):  # fmt: skip
        with tempfile.TemporaryDirectory() as directory:
            sizes = SIZES | {"num_hidden_layers": 4 + 7 * (scale - 1)}
            result = measure(write_large(Path(directory) / "large", stored, **sizes), loaded)
            print(np.dtype(stored), loaded, result, f"{result['peak'] / result['bytes']:.3f}")
