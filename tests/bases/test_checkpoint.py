"""Reading and writing Hugging Face checkpoints: what fits is read exactly, and what does not is named."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import SingleDeviceSharding

from spt_jax.bases.base import read_config
from spt_jax.bases.checkpoint import read_params
from spt_jax.bases.checkpoint_writing import write_checkpoint
from spt_jax.bases.config import decoder_config
from spt_jax.bases.tensors import SafetensorsFile
from spt_jax.errors import CheckpointError
from spt_jax.testing import FAMILIES, random_params, tiny_config, write_tiny_checkpoint

WEIGHTS = "model.safetensors"


def read(directory, dtype=jnp.float32):
    """Parameters and digest, on one device."""
    config = read_config(directory)
    return read_params(directory, config, dtype, lambda path: SingleDeviceSharding(jax.devices()[0]))


def edit(directory, change, file=WEIGHTS):
    """Rewrites a safetensors file with what `change` makes of its tensors."""
    tensors = safetensors.numpy.load_file(directory / file)
    safetensors.numpy.save_file(change(tensors), directory / file, metadata={"format": "pt"})


@pytest.fixture
def checkpoint(tmp_path):
    return write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read_bit_for_bit(family, dtype, tmp_path):
    written = random_params(decoder_config(tiny_config(family)), seed=3, dtype=dtype)
    directory = write_tiny_checkpoint(tmp_path, family, seed=3, dtype=dtype)
    params, _ = read(directory, dtype)
    assert jax.tree.structure(params) == jax.tree.structure(dict(written))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8)),
                 params, dict(written))  # fmt: skip


def test_linear_kernels_are_transposed_and_gpt2s_are_not(tmp_path):
    """Against the stored tensors themselves, so that writer and reader cannot share a mistake."""
    llama = write_tiny_checkpoint(tmp_path / "llama")
    stored, (params, _) = safetensors.numpy.load_file(llama / WEIGHTS), read(llama)
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["up"]["kernel"][1], stored["model.layers.1.mlp.up_proj.weight"].T
    )
    np.testing.assert_array_equal(params["output"], stored["lm_head.weight"].T)
    gpt2 = write_tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    stored, (params, _) = safetensors.numpy.load_file(gpt2 / WEIGHTS), read(gpt2)
    fused = stored["transformer.h.2.attn.c_attn.weight"]
    attention = params["layers"]["attention"]
    np.testing.assert_array_equal(
        np.concatenate([attention[name]["kernel"][2] for name in ("query", "key", "value")], -1), fused
    )


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    directory, reads = write_tiny_checkpoint(tmp_path, "gpt2", shards=2), []
    read_one = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: reads.append(name) or read_one(file, name))
    read(directory)
    stored = [key for file in directory.glob("*.safetensors") for key in safetensors.numpy.load_file(file)]
    assert sorted(reads) == sorted(stored)


def test_missing_tensor_is_named(checkpoint):
    edit(checkpoint, lambda t: {k: v for k, v in t.items() if k != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        read(checkpoint)


def test_unknown_tensor_is_named(checkpoint):
    edit(checkpoint, lambda t: t | {"model.layers.0.mlp.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"does not have: 'model\.layers\.0\.mlp\.extra\.weight' in model\.safet"):
        read(checkpoint)


def test_a_layer_that_the_config_does_not_have_is_unknown(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "gpt2")
    edit(directory, lambda t: t | {"transformer.h.3.attn.c_attn.bias": np.zeros(96, np.float32)})
    with pytest.raises(CheckpointError, match=r"transformer\.h\.3\.attn\.c_attn\.bias"):
        read(directory)


def test_duplicate_tensor_is_named_with_both_files(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    key, value = next(iter(safetensors.numpy.load_file(directory / first).items()))
    edit(directory, lambda t: t | {key: value}, second)
    with pytest.raises(CheckpointError, match=f"'{re.escape(key)}' is in both {first} and {second}"):
        read(directory)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("llama", "model.embed_tokens.weight", (320, 32)),
        ("llama", "model.layers.0.self_attn.k_proj.weight", (16, 32)),
        ("llama", "model.norm.weight", (32,)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (32, 96)),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", (96,)),
    ],
)
def test_misshapen_tensor_is_named_with_both_shapes(family, key, shape, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, family)
    edit(directory, lambda t: t | {key: np.zeros((*shape[:-1], shape[-1] + 1), np.float32)})
    wrong = re.escape(str((*shape[:-1], shape[-1] + 1)))
    with pytest.raises(CheckpointError, match=f"'{re.escape(key)}'.*{wrong}.*{re.escape(str(shape))}"):
        read(directory)


@pytest.mark.parametrize("kept", [0, 4, 100, 30_000])
def test_truncated_file_is_named(checkpoint, kept):
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: truncated or damaged"):
        read(checkpoint)


def test_damaged_header_is_named(checkpoint):
    file = checkpoint / WEIGHTS
    content = bytearray(file.read_bytes())
    content[20:40] = b"\xff" * 20
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: truncated or damaged"):
        read(checkpoint)


def test_no_weights(checkpoint):
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["model-00003-of-00002.safetensors", "../model.safetensors"])
def test_index_that_names_an_absent_file(name, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model", shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"index.json names '{re.escape(name)}'"):
        read(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(content, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, shards=2)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        read(directory)


def test_buffers_of_old_versions_are_passed_over(checkpoint):
    _, digest = read(checkpoint)
    edit(checkpoint, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert read(checkpoint)[1] == digest


def test_tied_checkpoint_may_hold_the_output_matrix(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "qwen2")
    params, digest = read(directory)
    edit(directory, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    again, digest_again = read(directory)
    assert digest_again == digest
    assert set(again) == set(params)
    edit(directory, lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        read(directory)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bloom", "falcon", "gpt_neox", "gptj", "opt"])
def test_a_model_saved_without_its_prefix_is_the_same(family, tmp_path):
    """As transformers' `AutoModel(...).save_pretrained` writes it: without the prefix and the output matrix."""
    directory = write_tiny_checkpoint(tmp_path, family, tie_word_embeddings=True)
    params, digest = read(directory)
    prefix = FAMILIES[family].prefix
    edit(directory, lambda t: {key.removeprefix(prefix): value for key, value in t.items()})
    again, digest_again = read(directory)
    assert digest_again == digest
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("family", "names", "buffers"),
    [
        ("bloom", {"transformer.": ""}, []),
        ("falcon", {}, ["transformer.h.{}.self_attention.rotary_emb.inv_freq"]),
        ("gpt_neo", {}, ["transformer.h.{}.attn.attention.bias", "transformer.h.{}.attn.attention.masked_bias"]),
        (
            "gpt_neox",
            {"lm_head.weight": "embed_out.weight"},
            [f"gpt_neox.layers.{{}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")],
        ),
        ("gptj", {}, ["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"]),
    ],
)
def test_names_and_buffers_of_published_checkpoints(family, names, buffers, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, family)
    params, digest = read(directory)

    def published(tensors):
        for ours, theirs in names.items():
            assert any(key.startswith(ours) for key in tensors)
            tensors = {key.replace(ours, theirs, 1): value for key, value in tensors.items()}
        return tensors | {name.format(i): np.ones(3, np.float32) for name in buffers for i in range(2)}

    edit(directory, published)
    again, digest_again = read(directory)
    assert digest_again == digest
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_output_matrix_and_its_bias_are_missing_together(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "gptj")
    edit(directory, lambda t: {key: value for key, value in t.items() if not key.startswith("lm_head.")})
    with pytest.raises(CheckpointError, match="no output matrix"):
        read(directory)


def test_an_untied_model_without_its_output_matrix(checkpoint):
    edit(checkpoint, lambda t: {key: value for key, value in t.items() if key != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"no output matrix.*or set tie_word_embeddings true in config\.json"):
        read(checkpoint)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(dtype, value, checkpoint):
    key = "model.layers.1.mlp.down_proj.weight"

    def damage(tensors):
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        tensors[key][3, 5] = value
        return tensors

    edit(checkpoint, lambda t: {name: tensor.astype(dtype) for name, tensor in t.items()})
    read(checkpoint)
    edit(checkpoint, damage)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor '{re.escape(key)}' holds NaN or infinity"):
        read(checkpoint)


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [(np.float32, 7e4, jnp.float16), (np.float64, 1e300, jnp.float32), (np.float32, 3.4e38, jnp.bfloat16)],
)
def test_values_beyond_the_precision_of_the_run_are_named(stored, value, dtype, checkpoint):
    def enlarge(tensors):
        tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
        tensors["model.norm.weight"][7] = value
        return tensors

    edit(checkpoint, enlarge)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds values beyond the range of .*base\.dtype"):
        read(checkpoint, dtype)


def test_integers_are_no_weights(checkpoint):
    edit(checkpoint, lambda t: t | {"model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds int8"):
        read(checkpoint)


def test_casts_round_to_nearest(tmp_path):
    """bfloat16 is widened exactly, float32 is rounded as JAX rounds it."""
    half = write_tiny_checkpoint(tmp_path / "half", dtype=ml_dtypes.bfloat16)
    full = write_tiny_checkpoint(tmp_path / "full")
    stored = safetensors.numpy.load_file(half / WEIGHTS)["model.embed_tokens.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read(half)[0]["embedding"], stored.astype(np.float32))
    exact, rounded = read(full)[0], read(full, jnp.bfloat16)[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)


def test_digest_is_of_the_tensors_alone(tmp_path):
    """Not of files, their names or the precision they are loaded in; and of every value."""
    whole, split = write_tiny_checkpoint(tmp_path / "a"), write_tiny_checkpoint(tmp_path / "b", shards=3)
    digest = read(whole)[1]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert read(split)[1] == digest
    assert read(whole, jnp.bfloat16)[1] == digest

    def nudge(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][31, 63] += 1e-6
        return tensors

    edit(whole, nudge)
    assert read(whole)[1] != digest


def test_digest_tells_swapped_tensors_apart(tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    digest = read(directory)[1]
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    edit(directory, lambda t: t | {one: t[two], two: t[one]})
    assert read(directory)[1] != digest


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    """A disk that fills up leaves the old file as it was."""
    directory = write_tiny_checkpoint(tmp_path)
    before = (directory / WEIGHTS).read_bytes()

    def full(tensors, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    config = read_config(directory)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(directory, config, random_params(config, 1), np.float32)
    assert (directory / WEIGHTS).read_bytes() == before
    assert not list(directory.glob("*.tmp"))
