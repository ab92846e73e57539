"""PEFT's `generate` with exported keys and values."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.templates import Template
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import export_peft
from spt_jax.prompts import PrefixTuning
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import write_tiny_checkpoint
from tests.parity.test_generation import NEW, torch_ids, torch_model
from tests.parity.test_peft_files import load_in_peft
from tests.parity.versions import PEFT_LOSES_PREFIX, older_transformers, peft_marks

pytestmark = [*peft_marks, older_transformers]


def test_peft_generates_from_exported_keys_and_values(tmp_path):
    """The ids are ours; where PEFT loses the prefix without a word, they are those of the bare base.

    docs/serving_elsewhere.md says so: when a new PEFT makes this fail, mend both, and `tests/parity/versions.py`.
    """
    base = load_base(write_tiny_checkpoint(tmp_path / "model", "llama", seed=7), dtype="float32")
    method = PrefixTuning(length=4)
    params = method.init_params(jax.random.key(0), base)
    params = jax.tree.map(lambda a: a + jax.random.normal(jax.random.key(1), a.shape), params)
    virtual = method.materialize(params, base.model)
    template = Template(prompt="{a}", target="{b}")
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, template), base)
    export_peft(tmp_path / "theirs", saved, base)

    ids = np.asarray([1, 17, 40, 41, 42])
    sampling = SamplingConfig(max_new_tokens=NEW)
    ours, bare = (generate(base, [ids], prompt, sampling)[0].ids for prompt in (virtual, None))
    assert ours != bare
    model = load_in_peft(tmp_path / "theirs", torch_model(tmp_path / "model"))
    inputs = torch.tensor(ids[None])
    theirs = torch_ids(model, input_ids=inputs, attention_mask=torch.ones_like(inputs))
    assert theirs == (bare if PEFT_LOSES_PREFIX else ours)
