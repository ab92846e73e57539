"""Families with experts: what their configs mean, what is refused, and tensors that are not read."""

import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.config import layer_configs
from spt_jax.testing import tiny_config, write_tiny_checkpoint


def sparse_layers(family, **fields):
    config = decoder_config(tiny_config(family, **fields))
    return [i for i, own in enumerate(layer_configs(config)) if own.experts is not None]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_which_layers_of_qwen_have_experts(family):
    assert sparse_layers(family, num_hidden_layers=7, decoder_sparse_step=3) == [2, 5]
    assert sparse_layers(family, num_hidden_layers=4, decoder_sparse_step=1, mlp_only_layers=[0, 2]) == [1, 3]
    assert sparse_layers(family, num_hidden_layers=3, decoder_sparse_step=1) == [0, 1, 2]
    assert sparse_layers(family, num_experts=0) == []
    config = decoder_config(tiny_config(family, num_hidden_layers=3, decoder_sparse_step=1))
    assert config.experts is not None and not config.variants


def test_which_layers_of_glm_have_experts():
    assert sparse_layers("glm4_moe", num_hidden_layers=5, first_k_dense_replace=2) == [2, 3, 4]
    assert sparse_layers("glm4_moe", num_hidden_layers=2, first_k_dense_replace=2) == []


def test_defaults_that_transformers_fills_in():
    """The weights of the chosen experts are renormalised only if the config says so, GLM rotates half of each head,
    and gpt-oss has its RoPE and its windows also if config.json does not mention them."""
    experts = decoder_config(hf_config({"model_type": "qwen3_moe", "num_hidden_layers": 2})).experts
    assert experts is not None and not experts.renormalize
    rope = decoder_config(hf_config({"model_type": "glm4_moe", "head_dim": 128})).rope
    assert rope is not None and rope.fraction == 0.5
    gpt = decoder_config(hf_config({"model_type": "gpt_oss", "num_hidden_layers": 4}))
    assert gpt.rope is not None
    assert (gpt.rope.kind, gpt.rope.factor, gpt.rope.theta, gpt.rope.truncate) == ("yarn", 32.0, 150_000.0, False)
    assert (gpt.window, gpt.window_layers) == (128, (0, 2))


def test_windows():
    """Of Qwen 3 in all layers, and of Qwen 2 in every second one below `max_window_layers`; if they are used at all."""
    own = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 6}
    assert decoder_config(tiny_config("qwen3_moe", **own)).window_layers == (0, 1, 2, 3, 4, 5)
    assert decoder_config(tiny_config("qwen2_moe", **own, max_window_layers=4)).window_layers == (0, 2)
    for family in ("qwen2_moe", "qwen3_moe"):
        unused = {**own, "use_sliding_window": False}
        assert decoder_config(tiny_config(family, **unused)).window_layers == ()


@pytest.mark.parametrize(
    "family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared", "glm4_moe"]
)
def test_experts_with_another_activation_are_refused(family):
    with pytest.raises(ConfigError, match=f"hidden_act 'gelu' is not supported for {family}"):
        decoder_config(tiny_config(family, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "'num_local_experts' is 1000000000"),
        ({"model_type": "qwen3_moe", "num_experts": "many"}, "'num_experts' is 'many'"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ({"model_type": "glm4_moe", "n_shared_experts": 10**6}, "'n_shared_experts' is 1000000"),
        ({"model_type": "granitemoeshared", "shared_intermediate_size": -1}, "'shared_intermediate_size' is -1"),
    ],
)
def test_sizes_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        hf_config(fields)


def test_more_experts_per_token_than_there_are():
    with pytest.raises(ConfigError, match="top_k is 7, but there are only 4 experts"):
        decoder_config(tiny_config("mixtral", num_experts_per_tok=7))


def with_layer(directory, layer):
    """Adds the tensors of one more layer, as GLM has them for the prediction of further tokens."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    for name in ("eh_proj.weight", "enorm.weight", "shared_head.head.weight", "mlp.experts.0.up_proj.weight"):
        tensors[f"model.layers.{layer}.{name}"] = np.ones((2, 2), np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_the_layer_that_predicts_further_tokens_is_not_read(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "glm4_moe")
    fingerprint = load_base(directory, dtype="float32").fingerprint
    with_layer(directory, 3)
    assert load_base(directory, dtype="float32").fingerprint == fingerprint
    with_layer(directory, 4)
    with pytest.raises(CheckpointError, match="holds 4 tensors that a glm4_moe model does not have"):
        load_base(directory)


def test_other_families_have_no_such_layer(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, "olmoe")
    with_layer(directory, 2)
    with pytest.raises(CheckpointError, match="holds 4 tensors that a olmoe model does not have"):
        load_base(directory)


def test_gpt_oss_alternates_the_columns_of_gate_and_up(tmp_path):
    """Against the stored tensors themselves, so that writer and reader cannot share a mistake."""
    directory = write_tiny_checkpoint(tmp_path, "gpt_oss")
    stored = safetensors.numpy.load_file(directory / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    experts = load_base(directory, dtype="float32").params["layers"]["mlp"]["experts"]
    assert stored.shape == (6, 32, 16)
    np.testing.assert_array_equal(experts["gate"]["kernel"][1], stored[:, :, ::2])
    np.testing.assert_array_equal(experts["up"]["kernel"][1], stored[:, :, 1::2])
