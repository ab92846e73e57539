"""Every method on every family: shapes without compilation; training and serving for one family of each kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.families import FAMILIES
from spt_jax.bases.fingerprint import Fingerprint
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, run_stream, target_scores
from spt_jax.inference.generation import SamplingConfig
from spt_jax.models.decoder import Decoder
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.prompts import (
    METHODS,
    PrefixTuning,
    PromptTuning,
    VirtualPrompt,
    prefix_tuning,
    prefix_tuning_plus,
    state_tuning,
)
from spt_jax.prompts.initializers import uniform
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.runtime.sharding import make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base, tiny_config, tiny_tokenizer
from spt_jax.training.checkpoints import Checkpoints
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.step import init_state, make_train_step
from tests.examples import QUICK_COMPILE, VIRTUAL
from tests.family import batch_of, method_of
from tests.golden.cases import E2B
from tests.layouts import Run, lay_out


def _distinct() -> dict:
    """The configs of the tiny models whose functions differ, by the first family of each."""
    found: dict = {}
    for family in FAMILIES:
        config = FAMILIES[family].config(tiny_config(family), None)
        found.setdefault(dataclasses.replace(config, family=""), (family, config))
    return dict(found.values())


CONFIGS = _distinct()


def zero_base(family: str) -> FrozenBase:
    """A base of zeros, which no file is written for."""
    config = CONFIGS[family]
    model = DecoderModel(zeros(parameter_shapes(config)), Decoder(config, mesh=make_mesh()))
    return FrozenBase(family, None, model, tiny_tokenizer(), (), Fingerprint({}, "", ""))


def zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@functools.cache
def token_batch():
    """Rows with virtual tokens; without leading ids, the model is traced once."""
    return batch_of(method_of("prompt_tuning"), tiny_base(), shared=False, packing=True)


def whole_prompt(base: FrozenBase, specs: dict[str, VirtualPrompt]) -> VirtualPrompt:
    """The shapes of a prompt that has all parts which training and serving give to a model."""
    of_tokens = specs["decomposed_prompt_tuning"]
    prefix = PrefixTuning(length=VIRTUAL, states=bool(base.layout.state_groups)).spec(base.layout).prefix
    gated = specs["llama_adapter"].gated if "llama_adapter" in specs else None  # of bases with wide embeddings
    linear, edits = specs["prefix_tuning_plus"].linear, specs["reft"].edits
    parts = {"gated": gated, "linear": linear, "edits": edits, "replaced": specs["trained_tokens"].replaced}
    return dataclasses.replace(of_tokens, prefix=prefix, **parts, pinned=base.layout.windowed)


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_and_a_loss_without_compilation(family, monkeypatch):
    base, specs, computed = zero_base(family), {}, prefix_tuning.memory_of_rows
    for module in (prefix_tuning, prefix_tuning_plus, state_tuning):
        monkeypatch.setattr(module, "memory_of_rows", lambda *inputs: zeros(jax.eval_shape(computed, *inputs)))
    for name in METHODS:
        method = method_of(name)
        if hasattr(method, "init"):
            method = dataclasses.replace(method, init=uniform())
        if hasattr(method, "pin_prefix"):
            method = dataclasses.replace(method, pin_prefix=base.layout.windowed)
        if name == "state_tuning" and not base.layout.state_groups:
            with pytest.raises(ConfigError, match="needs recurrent layers"):
                method.check_base(base)
            continue
        if name == "llama_adapter" and base.layout.width != base.config.width:
            with pytest.raises(ConfigError, match="embeddings as wide as the layers"):
                method.init_params(jax.random.key(0), base)
            continue
        method.check_base(base)
        params = method.init_params(jax.random.key(0), base)
        virtual, specs[name] = jax.eval_shape(method.materialize, params, base.model), method.spec(base.layout)
        assert jax.tree.structure(virtual) == jax.tree.structure(specs[name])
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), virtual) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), specs[name]
        )
        trainable = method.trainable(params)
        assert jax.tree.structure(trainable) == jax.tree.structure(params) and any(jax.tree.leaves(trainable))

    def loss(model, virtual, batch):
        prefix = encode_prefix(model, virtual, batch.lead_ids)
        scores = target_scores(model, virtual, prefix, batch.rows)
        return CrossEntropy().loss(scores, batch.rows)

    total, weight = jax.eval_shape(loss, base.model, whole_prompt(base, specs), token_batch())
    assert total.shape == weight.shape == ()


# Families whose layers differ in kind, each with a method of another part. A base with windows is in
# `test_pin_prefix.py`, one with recurrent layers in `test_state_tuning.py`, and Llama with every method in
# `test_family.py`.
KINDS = {
    "bloom": PrefixTuning(length=4),  # ALiBi
    "gpt2": PromptTuning(length=VIRTUAL),  # LayerNorm, learned positions
    "mixtral": PrefixTuning(length=4, reparameterization="mlp", hidden=8),  # experts
    "deepseek_v3": PrefixTuning(length=4, sink=1),  # latent attention
    "falcon_h1": PrefixTuning(length=4, states=True),  # attention beside a recurrent layer
    "gemma4_text": PromptTuning(length=VIRTUAL),  # embeddings by layer, layers that read others' keys and values
}


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def logits_of(model, virtual, ids, stream):
    prefix = encode_prefix(model, virtual, jnp.zeros(0, jnp.int32))
    hidden, _ = run_stream(model, virtual, ids, stream, prefix)
    return model.logits(hidden)


@pytest.mark.parametrize("family", KINDS)
def test_trains_resumes_and_serves(family, tmp_path):
    changes = E2B if family == "gemma4_text" else {}
    base, method, optimizer = tiny_base(family, **changes), KINDS[family], optax.adam(0.02)
    batch = batch_of(method, base, shared=True, packing=True)
    state = init_state(jax.random.key(0), base, method, optimizer)
    step, losses = make_train_step(base, method, optimizer, VerbalizerCrossEntropy(choices=3)), []
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for number in range(6):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if number == 3:
                checkpoints.save(state, {}, {})
        again, _, _ = checkpoints.restore(None, init_state(jax.random.key(9), base, method, optimizer))
    assert losses[-1] < losses[0], losses
    for _ in range(2):
        again, _ = step(again, batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again.params, state.params)

    virtual = method.materialize(state.params, base.model)
    soft = "<soft>" if method.token_count else ""
    template = Template(prompt=f"{soft}Question: {{text}}", target="{label}", virtual_tokens=method.token_count)
    bank = PromptBank(base)
    bank.add("own", load_prompt(save_prompt(tmp_path / "prompt", base, method, virtual, template), base))
    asked = bank.request_ids("own", {"text": "the world"})
    (answer,) = Engine(bank, slots=1).generate([Request(asked, "own", SamplingConfig(max_new_tokens=5))])
    ids = np.append(asked, answer.ids).astype(np.int32)
    padded, stream = lay_out([Run(0, 0, ids)], 48)
    stream = dataclasses.replace(stream, positions=stream.positions + virtual.prefix_length)
    logits = np.asarray(logits_of(base.model, virtual, padded, stream))[0, len(asked) - 1 : len(ids) - 1]
    assert logits.argmax(-1).tolist() == answer.ids
    chosen = logits.max(-1) - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(answer.log_probabilities, chosen, atol=1e-4)
