"""int8 kernels: what they are, that the model computes with them, and that everything else goes on as before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
import train
from spt_jax.bases.base import load_base
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.attention import Stream
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.layers import dense
from spt_jax.models.quantized import Int8, quantizations
from spt_jax.prompts import LlamaAdapter, PrefixTuning, PromptTuning
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base
from tests.jobs import losses, words, write_task

IDS = jnp.asarray([[1, 40, 41, 42, 60, 9]])


def kernels(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, Int8))
    return [leaf for leaf in leaves if isinstance(leaf, Int8)]


def all_logits(model):
    places = jnp.arange(IDS.shape[1])[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places))
    hidden, _ = jax.jit(DecoderModel.run)(model, model.embed(IDS), stream)
    return model.logits(hidden[0])


def exactly(base):
    """The same numbers as plain kernels."""
    return jax.tree.map(
        lambda a: dense(a) if isinstance(a, Int8) else a, base.model, is_leaf=lambda a: isinstance(a, Int8)
    )


@pytest.fixture(scope="module")
def base():
    return tiny_base(quantize="int8")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "qwen2_moe", "gpt_oss"])
def test_kernels_are_the_checkpoint_s_to_half_a_step(family):
    """All but those that choose experts and weigh the shared MLP."""
    plain, own = tiny_base(family), tiny_base(family, quantize="int8")
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(plain.params)]
    exact = [path for path, _ in leaves if "router" in path or "shared_gate" in path]
    expected = [leaf for path, leaf in leaves if "kernel" in path and path not in exact]
    assert bool(exact) == (family in ("qwen2_moe", "gpt_oss"))
    for theirs, ours in zip(expected, kernels(own.params), strict=True):
        assert ours.values.dtype == jnp.int8 and ours.values.shape == theirs.shape
        assert np.all(np.abs(dense(ours) - theirs) <= ours.scale[..., None, :] * 0.5001)
        np.testing.assert_array_equal(np.abs(ours.values).max(axis=-2), 127)
    assert own.fingerprint == dataclasses.replace(plain.fingerprint, quantize="int8")
    assert own.parameter_count == plain.parameter_count


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_the_model_computes_with_their_numbers(family):
    base = tiny_base(family, quantize="int8")
    np.testing.assert_allclose(all_logits(base.model), all_logits(exactly(base)), atol=1e-4)
    off = np.abs(all_logits(base.model) - all_logits(tiny_base(family).model)).max()
    assert 0 < off < 0.1 * np.abs(all_logits(base.model)).max()


def test_layers_are_a_quarter_as_large():
    plain, own = (load_base("starter", quantize=quantize).params["layers"] for quantize in (None, "int8"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (plain, own)]
    assert sizes[1] < 0.27 * sizes[0]


@pytest.mark.parametrize("family", ["llama", "granitemoeshared"])
def test_on_a_mesh(family):
    base, mesh = tiny_base(family, quantize="int8"), make_mesh(MeshConfig(fsdp=2, tensor=2))
    split = tiny_base(family, quantize="int8", mesh=mesh)
    np.testing.assert_allclose(all_logits(split.model), all_logits(base.model), atol=1e-4)
    sharded = [own for own in kernels(split.params) if not own.values.sharding.is_fully_replicated]
    assert sharded and all(own.scale.sharding.mesh == split.mesh for own in sharded)


@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=3), LlamaAdapter(length=2, layers=2)])
def test_prompts_see_their_numbers(base, method):
    """As a prompt of the same numbers in plain kernels."""
    params = method.init_params(jax.random.key(0), base)
    ours = method.materialize(params, base.model)
    theirs = method.materialize(params, exactly(base))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_training_goes_on_with_them(tmp_path):
    """Through the command line: the loss begins where the plain base's does, and falls."""
    write_task(tmp_path)
    found = {}
    once = ("--train.steps", "1", "--train.checkpoint-every", "1")
    for name, more in (("plain", once), ("int8", ("--base.quantize", "int8"))):
        line = words(tmp_path, tmp_path / name, *more, "--data.validation", "None", "--data.hard-prompt")
        assert train.main(line) == 0
        found[name] = losses(tmp_path / name)
    ours, theirs = ([loss for _, loss in found[name]] for name in ("int8", "plain"))
    assert np.mean(ours[-10:]) < 0.8 * np.mean(ours[:10])
    assert ours[0] == pytest.approx(theirs[0], rel=0.05)


def test_the_engine_serves_it(base, tmp_path):
    method = PromptTuning(length=3)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=3)
    spt_jax.save_prompt(tmp_path / "p", base, method, virtual, template)
    bank = PromptBank(base)
    bank.load("p", tmp_path / "p")
    sampling = SamplingConfig(max_new_tokens=8)
    ids = bank.request_ids("p", {"text": "the"})
    (ours,) = Engine(bank, slots=2).generate([Request(ids, "p", sampling)])
    (theirs,) = generate(base, [ids], virtual, sampling)
    assert ours.ids == theirs.ids


def test_other_precisions_are_refused(tmp_path, capsys):
    write_task(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train.main(words(tmp_path, tmp_path / "run", "--base.quantize", "int3"))
    error = capsys.readouterr().err
    assert all(name in error for name in quantizations())
