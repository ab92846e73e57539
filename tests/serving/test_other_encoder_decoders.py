"""Servers of BART and T5Gemma answer as the library does without one."""

import dataclasses

import numpy as np
import pytest

from spt_jax.prompts import PrefixTuning
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.testing import tiny_base
from tests.serving import test_encoder_decoder_server as served
from tests.serving.test_encoder_decoder_server import added, generate, requests_of


def forced(base):
    """The base with a forced first token."""
    model = base.model
    config = dataclasses.replace(model.config, forced_id=17)
    return dataclasses.replace(base, model=dataclasses.replace(model, module=model.module.clone(config=config)))


@pytest.mark.parametrize("family", ["bart", "t5gemma2"])
def test_a_mixture_is_answered_as_each_alone(family, tmp_path, monkeypatch):
    """Learned positions and a forced token; one softmax for two sites, and windows that do not hide a prefix."""
    pinned = PrefixTuning(length=4, pin_prefix=family == "t5gemma2"), "a word: {text}", {}
    monkeypatch.setitem(served.PROMPTS, "sites", pinned)
    base = tiny_base(family, seed=3)
    bank = added(PromptBank(forced(base) if family == "bart" else base), tmp_path, ["sites"])
    requests = requests_of(bank, ["sites", None])[:3]
    found = Engine(bank, slots=2, context=96).generate(requests)
    for ours, request in zip(found, requests, strict=True):
        virtual = bank.entry(request.prompt).virtual
        (theirs,) = generate(bank.base, [request.ids], virtual, request.sampling)
        assert ours.ids == theirs.ids and (family != "bart" or ours.ids[0] == 17)
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4)
