"""What accelerator.py compares: the same weights and start in both frameworks, and PEFT's other configurations."""

import dataclasses
import time

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import transformers

from benchmarks.accelerator_stages import train_peft, train_spt_jax
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.workload import TINY, fill_torch_model, llama_config, random_base
from spt_jax.bases.places import places
from tests.parity.versions import peft_marks

pytestmark = peft_marks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_frameworks_hold_the_same_weights(dtype):
    base = random_base(dataclasses.replace(TINY, dtype=dtype))
    model = transformers.AutoModelForCausalLM.from_config(llama_config(TINY), dtype=getattr(torch, dtype))
    fill_torch_model(model)
    stored = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for key, fills in places(base.config).items():
        for place in fills:
            leaf = base.params
            for name in place.path:
                leaf = leaf[name]
            np.testing.assert_array_equal(place.stored(np.asarray(leaf, np.float32)), stored[key])
    deviation = np.asarray(base.params["embedding"], np.float32).std()
    assert 0.0195 < deviation < 0.0205
    kernels = jax.tree.leaves(base.params["layers"]["mlp"])
    assert len({float(kernel[layer, 0, 0]) for kernel in kernels for layer in range(2)}) == 2 * len(kernels)


@pytest.mark.parametrize(("method", "checkpointing"), [("prompt", True), ("prefix", False)])
def test_both_frameworks_begin_with_the_same_loss(method, checkpointing, tmp_path):
    def first_loss(module, **options) -> float:
        record = Record(tmp_path / "a.json", status="running")
        module.run(Task(tmp_path / "a.json", time.time() + 60, True, {"batch": 4, "method": method, **options}), record)
        assert record.content["at"] == "end" and record.content["tokens_per_second"] > 0
        return record.content["first_loss"]

    ours = first_loss(train_spt_jax, attention="xla", remat="full")
    assert ours == pytest.approx(first_loss(train_peft, checkpointing=checkpointing), rel=1e-5)
