"""Encoder-decoders: rows, biases, meshes, quantized matrices, files, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base
from spt_jax.bases.families import ENCODER_DECODERS
from spt_jax.bases.fingerprint import fingerprint_of
from spt_jax.data.batches import pack, plan_batches
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.evaluation.bare import bare_examples
from spt_jax.inference.forward import target_scores
from spt_jax.models.attention import Cache
from spt_jax.models.config import DecoderConfig
from spt_jax.models.relative_bias import position_bucket
from spt_jax.prompts import PrefixTuning
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.mesh_config import MeshConfig
from spt_jax.runtime.sharding import make_mesh
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from tests.encoder_decoders import START, choice, logits_by_target, rows_of, text, words
from tests.golden import encoder_decoders as golden

P = 3


@pytest.fixture(scope="module")
def base():
    return tiny_base("umt5", seed=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def examples(base):
    virtual = base.layout.vocab_size + np.arange(P, dtype=np.int32)
    prompts = [np.concatenate([virtual, words(count, count)]) for count in (12, 5, 9)]
    answers = [words(3, 21), words(1, 22), words(2, 23)]
    return [choice(prompt, answers, index=index) for index, prompt in enumerate(prompts)]


@jax.jit
def scores(model, tokens, rows):
    return target_scores(model, VirtualPrompt(tokens=tokens), None, rows).log_probabilities[:, :, 0]


@jax.jit
def total(model, tokens, rows):
    return (scores(model, tokens, rows) * rows.target_weights).sum()


def prompt_of(base):
    return jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (P, base.layout.width)), jnp.float32)


def test_buckets():
    """Those that T5's authors give: one for each distance below 8, then up to 128 in logarithmic ranges."""
    apart = jnp.asarray([0, -1, -7, -8, -11, -12, -64, -127, -128, -5000, 1, 7, 8, 128])
    found = position_bucket(apart, bidirectional=True, buckets=32, max_distance=128)
    assert found.tolist() == [0, 1, 7, 8, 8, 9, 14, 15, 15, 15, 17, 23, 24, 31]
    found = position_bucket(apart, bidirectional=False, buckets=32, max_distance=128)
    assert found.tolist() == [0, 1, 7, 8, 11, 12, 26, 31, 31, 31, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["t5 1.1", "umt5 tied", "bart", "mbart", "t5gemma", "t5gemma2"])
def test_logits_equal_stored_ones_of_transformers(name):
    """The other cases are compared with transformers itself, in tests/parity."""
    family, overrides = golden.CASES[name]
    base = tiny_base(family, seed=golden.SEED, **overrides)
    rows = rows_of([text(golden.PROMPT, golden.TARGET)], packing=False)
    found = golden.kept(logits_by_target(base, rows)[0, 0])
    np.testing.assert_allclose(found, safetensors.numpy.load_file(golden.GOLDEN)[name], atol=1e-4, rtol=0)


def test_every_case_is_stored():
    assert set(safetensors.numpy.load_file(golden.GOLDEN)) == set(golden.CASES)
    assert {family for family, _ in golden.CASES.values()} == set(ENCODER_DECODERS)


def test_rows_of_one_and_of_several_examples_agree(base, examples):
    """Log-probabilities of every verbalizer, and the gradient of the prompt."""
    tokens, found = prompt_of(base), []
    gradient = jax.jit(jax.value_and_grad(total, argnums=1))
    for packing in (False, True):
        rows = rows_of(examples, packing=packing)
        found.append(gradient(base.model, tokens, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)


def test_gradient_is_that_of_finite_differences(base, examples):
    tokens, rows = prompt_of(base), rows_of(examples, packing=True)
    gradient = jax.jit(jax.grad(total, argnums=1))(base.model, tokens, rows)
    for place in range(P):
        step = np.zeros(tokens.shape, np.float32)
        step[place] = 1e-3 * np.random.default_rng(place).normal(size=base.layout.width)
        above, below = (float(total(base.model, tokens + sign * step, rows)) for sign in (1, -1))
        assert (above - below) / 2 == pytest.approx(float((gradient * step).sum()), rel=0.03)


def test_the_encoder_does_not_see_the_decoder(base):
    prompt = words(8)
    rows = [rows_of([text(prompt, target)], packing=False) for target in (words(4, 1), words(4, 2))]
    rows = jax.tree.map(jnp.asarray, rows)
    hidden = [base.model.run(base.model.embed(row.ids), row.stream)[0] for row in rows]
    np.testing.assert_array_equal(hidden[0][0, :8], hidden[1][0, :8])
    assert np.abs(hidden[0][0, 9:12] - hidden[1][0, 9:12]).max() > 0.01


def test_a_mesh_changes_nothing(base, examples):
    tokens, rows = prompt_of(base), rows_of(examples + examples[:1], packing=False)
    expected = scores(base.model, tokens, rows)
    split = tiny_base("umt5", seed=3, tie_word_embeddings=False, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    with jax.set_mesh(split.mesh):
        found = scores(split.model, tokens, rows)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_int8_matrices(base, examples):
    tokens, rows = prompt_of(base), rows_of(examples, packing=True)
    quantized = tiny_base("umt5", seed=3, tie_word_embeddings=False, quantize="int8")
    assert quantized.parameter_count == base.parameter_count
    exact, found = (np.asarray(scores(one.model, tokens, rows)) for one in (base, quantized))
    assert 0 < np.abs(exact - found).max() < 0.1 * np.abs(exact).max()


def test_whether_the_output_matrix_is_tied_follows_from_the_files(tmp_path):
    """`tie_word_embeddings` of config.json only says whether hidden states are scaled."""
    write_tiny_checkpoint(tmp_path, "t5", seed=1, tie_word_embeddings=False)
    own = load_base(tmp_path).model.config
    assert not own.tied and own.output_scale is None
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    output = tensors.pop("lm_head.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tied = load_base(tmp_path).model.config
    assert tied == dataclasses.replace(own, tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale_decoder_outputs": True}))
    tensors["lm_head.weight"] = output
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scaled = load_base(tmp_path).model.config
    assert not scaled.tied and scaled.output_scale == pytest.approx(32**-0.5)


def test_copies_of_the_embedding_table_are_left_out(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "t5", seed=1)
    before = load_base(directory).fingerprint
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    more = {f"{side}.embed_tokens.weight": tensors["shared.weight"].copy() for side in ("encoder", "decoder")}
    safetensors.numpy.save_file({**tensors, **more}, directory / "model.safetensors", metadata={"format": "pt"})
    assert load_base(directory).fingerprint == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.block.1.layer.1.EncDecAttention.q.weight"), "lacks 1 tensors of a t5"),
        (lambda tensors: tensors.update(other=np.zeros(3, np.float32)), "does not have: 'other'"),
        (
            lambda tensors: tensors.update({"encoder.final_layer_norm.weight": np.ones(8, np.float32)}),
            "has shape .8,.; the config asks for .32,.",
        ),
    ],
)
def test_a_checkpoint_that_is_not_complete(change, message, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "t5")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_base(directory)


def test_fingerprints_of_other_kinds_differ(base):
    sizes = {"vocab_size": 320, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp_width": 48}
    config = DecoderConfig(family="llama", max_positions=128, **sizes)
    decoder = fingerprint_of(config, "1" * 64, base.fingerprint.tokenizer)
    differences = "; ".join(base.fingerprint.differences(decoder))
    assert "family is" in differences and "weights is" in differences


def test_what_is_refused(base, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "t5")
    with pytest.raises(ConfigError, match="attention 'splash' is for decoders"):
        load_base(directory, attention="splash")
    with pytest.raises(ConfigError, match=r"mesh\.sequence > 1 does not work with encoder-decoders"):
        load_base(directory, mesh=make_mesh(MeshConfig(sequence=2)))
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        _ = base.decoder
    with pytest.raises(ConfigError, match="llama is no encoder-decoder; leave it out"):
        PrefixTuning(length=2, sites=("cross",)).check_base(tiny_base("llama"))
    with pytest.raises(ConfigError, match="names a site twice"):
        PrefixTuning(length=2, sites=("self", "self"))
    row = jax.tree.map(jnp.asarray, rows_of([text(words(4), words(3))], packing=False))
    cache = Cache({}, row.stream.positions, row.stream.segments)
    with pytest.raises(ConfigError, match="must consist of the decoder's tokens"):
        base.model.run(base.model.embed(row.ids), row.stream, None, cache)


def test_rows_without_tokens_of_the_decoder(base):
    example = dataclasses.replace(text(words(4), words(3)), starts=None)
    with pytest.raises(ConfigError, match="no tokens for the decoder"):
        scores(base.model, prompt_of(base), rows_of([example], packing=False))


def test_an_example_that_was_not_planned_for():
    plan = plan_batches([text(words(20), words(3))], lead=0, batch_size=1)
    with pytest.raises(DataError, match="rows were planned for 96 and 3, 9 and 3 of them for the decoder"):
        pack([text(words(5), words(9))], plan)


def test_examples_without_virtual_tokens_keep_the_start_of_the_decoder():
    """The bare base reads the same decoder tokens."""
    base = tiny_base("t5")
    prompt = np.concatenate([[base.layout.vocab_size, 5, 6], [base.layout.vocab_size + 1, 7]])
    (bare,) = bare_examples(base, [choice(prompt, [words(2), words(3, seed=1)])])
    assert bare.ids.tolist() == [5, 6, 7, START] and bare.starts == 3
