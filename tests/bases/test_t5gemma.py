"""Files and options of T5Gemma and T5Gemma 2, and that the decoder of the first reads a table of its own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base
from spt_jax.bases.config import hf_config, model_config
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.testing import tiny_base, tiny_config, write_tiny_checkpoint
from tests.encoder_decoders import rows_of, text, words

HEAD = "lm_head.out_proj.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("t5gemma"), "t5gemma", seed=1)


def written(directory, folder, tensors):
    for file in directory.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_stored_copy_of_a_tied_output_matrix(directory, tmp_path):
    """It is that of the decoder's table, and another matrix is refused."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors[HEAD] = tensors["model.decoder.embed_tokens.weight"].copy()
    assert load_base(written(directory, tmp_path, tensors)).fingerprint == load_base(directory).fingerprint
    tensors[HEAD] = tensors["model.encoder.embed_tokens.weight"].copy()
    with pytest.raises(CheckpointError, match=r"'model\.decoder\.embed_tokens\.weight' differ"):
        load_base(written(directory, tmp_path, tensors))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("model.decoder.layers.0.post_cross_attn_layernorm.weight"), CheckpointError, "lacks 1 tensor"),
        (lambda t: t.update({"score.out_proj.weight": np.zeros((2, 32), np.float32)}), ConfigError, "train a task"),
        (lambda t: t.update({"model.decoder.other": np.zeros(3, np.float32)}), CheckpointError, "does not have"),
    ],
)
def test_tensors_that_do_not_fit(change, error, message, directory, tmp_path):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    with pytest.raises(error, match=message):
        load_base(written(directory, tmp_path, tensors))


def test_options_that_are_refused():
    fields = tiny_config("t5gemma").to_dict()
    for name, value in (("hidden_size", 64), ("sliding_window", 9), ("attn_logit_softcapping", None)):
        other = {**fields, "decoder": {**fields["decoder"], name: value}}
        with pytest.raises(ConfigError, match=f"sides differ in {name}"):
            model_config(hf_config(other))
    with pytest.raises(ConfigError, match="attention_bias is not supported"):
        model_config(tiny_config("t5gemma", attention_bias=True))
    with pytest.raises(ConfigError, match="bos_token_id; set one"):
        model_config(tiny_config("t5gemma", bos_token_id=None))
    with pytest.raises(ConfigError, match="'num_hidden_layers' is 0"):
        hf_config({**fields, "encoder": {**fields["encoder"], "num_hidden_layers": 0}})
    config = model_config(tiny_config("t5gemma"))
    assert isinstance(config, EncoderDecoderConfig)
    with pytest.raises(ConfigError, match="a rope belongs to those"):
        dataclasses.replace(config, rope=None)
    with pytest.raises(ConfigError, match="encoder_windows names more than the 3 layers"):
        dataclasses.replace(config, encoder_windows=(3,))
    with pytest.raises(ConfigError, match="need window >= 1"):
        dataclasses.replace(config, window=0)
    with pytest.raises(ConfigError, match="both numbers must be at least 0"):
        dataclasses.replace(config, encoder_reach=(-1, 0))


def test_the_first_token_of_the_decoder(directory, tmp_path):
    """`decoder_start_token_id`, or else the BOS of the decoder's config."""
    assert load_base(directory).layout.start_id == 1
    written(directory, tmp_path, safetensors.numpy.load_file(directory / "model.safetensors"))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "decoder_start_token_id": 9}))
    assert load_base(tmp_path).layout.start_id == 9


def test_each_side_reads_its_own_table(directory):
    base, ids = load_base(directory), words(5)
    rows = rows_of([text(ids, words(3, 1))], packing=False)
    assert not np.array_equal(base.params["embedding"], base.params["decoder"]["embedding"])
    np.testing.assert_array_equal(base.model.embed(jnp.asarray(ids)), np.asarray(base.params["embedding"])[ids])
    np.testing.assert_array_equal(base.model.output_matrix, base.params["decoder"]["embedding"])
    run = jax.jit(lambda model, x, stream: model.run(x, stream)[0])
    x = base.model.embed(jnp.asarray(rows.ids))
    with pytest.raises(ValueError, match=r"Stream\.ids must hold the ids"):
        run(base.model, x, rows.stream)
    stream = dataclasses.replace(rows.stream, ids=rows.ids)
    changed = x.at[:, 5:].set(7.0)  # The encoder's embeddings of the decoder's tokens.
    np.testing.assert_array_equal(run(base.model, changed, stream)[0, 5:8], run(base.model, x, stream)[0, 5:8])


def test_quantized_matrices_generate():
    """Both tables are quantized."""
    base = tiny_base("t5gemma", seed=1, quantize="int8")
    ids = np.concatenate([words(9), [base.layout.start_id]]).astype(np.int32)
    (answer,) = generate(base, [ids], sampling=SamplingConfig(max_new_tokens=3))
    assert len(answer.ids) == 3 and np.isfinite(answer.log_probabilities).all()


def test_files_of_t5gemma_2(tmp_path):
    """Those of the model of images are left out, and so are copies of the table."""
    directory = write_tiny_checkpoint(tmp_path / "model", "t5gemma2", seed=1)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    table = tensors["model.encoder.text_model.embed_tokens.weight"]
    more = {
        "model.encoder.vision_tower.post_layernorm.bias": np.zeros(16, np.float32),
        "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight": np.zeros(16, np.float32),
        "model.decoder.embed_tokens.weight": table.copy(),
        "model.decoder.embed_tokens.eoi_embedding": np.zeros(32, np.float32),
        HEAD: table.copy(),
    }
    folder = tmp_path / "again"
    folder.mkdir()
    assert load_base(written(directory, folder, {**tensors, **more})).fingerprint == load_base(directory).fingerprint
    with pytest.raises(CheckpointError, match="differ"):
        load_base(written(directory, folder, {**tensors, HEAD: table + 1}))
    tensors.pop("model.decoder.layers.0.self_attn.k_norm.weight")
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        load_base(written(directory, folder, tensors))
    for options, message in (
        ({"attn_logit_softcapping": 5.0}, "transformers ignores it"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_config(tiny_config("t5gemma2", **options))
