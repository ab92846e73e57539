"""`examples/gemma3.py`: models of the library `gemma` as bases. Skipped where that library is not installed."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.testing import check_model
from tests.markdown import ROOT

pytest.importorskip("gemma")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import gemma3

    return gemma3


@pytest.mark.parametrize("caps", [False, True])
def test_logits_are_those_of_the_library(example, caps):
    tokenizer = example.facts_tokenizer()
    model = example.small_gemma(tokenizer.get_vocab_size())
    if caps:  # those of Gemma 2
        model = model.clone(config=dataclasses.replace(model.config, final_logit_softcap=2.0, attn_logits_soft_cap=1.0))
    ids = np.random.default_rng(0).integers(tokenizer.get_vocab_size(), size=(2, 24), dtype=np.int32)
    ids[ids == 0] = 1  # the library takes 0 for padding
    variables = model.init(jax.random.key(0), ids)
    base = example.as_base(model, variables, tokenizer, max_positions=64, end_ids=[0])
    positions = np.broadcast_to(np.arange(24), ids.shape)
    mask = np.broadcast_to(np.tril(np.ones((24, 24), bool)), (2, 24, 24))
    inputs = base.model.embed(jnp.asarray(ids)), jnp.asarray(positions), jnp.asarray(mask)
    states = base.model.functions.hidden(variables, *inputs)
    found = base.model.functions.logits(variables, states)
    np.testing.assert_allclose(found, model.apply(variables, ids).logits, atol=1e-5)
    check_model(base.model)


def test_the_prompt_asks_for_the_colour(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    script = str(ROOT / "examples" / "gemma3.py")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"(\S+) without the prompt, (\S+) with it", run.stdout).groups())
    assert before < 0.4 and after > 0.9
