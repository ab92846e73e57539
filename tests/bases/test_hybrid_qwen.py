"""Qwen 3.5 and Qwen3-Next: what their configs leave open, and the names and shapes of their stored tensors."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base, read_config
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.config import layer_configs
from spt_jax.testing import tiny_config, write_tiny_checkpoint

TEXT = "qwen3_5_text"
FAMILIES = (TEXT, "qwen3_5_moe_text", "qwen3_next")
WEIGHTS = "model.safetensors"


def recurrent_layers(config) -> list[int]:
    return [i for i, layer in enumerate(layer_configs(config)) if layer.delta_net is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_open(family):
    """A quarter of each head is rotated, and every fourth layer has attention."""
    hf = tiny_config(family, layer_types=None, num_hidden_layers=8, head_dim=16, rope_parameters={"rope_theta": 1e6})
    config = decoder_config(hf)
    assert config.rope.fraction == 0.25 and config.rope.theta == 1e6
    assert recurrent_layers(config) == [0, 1, 2, 4, 5, 6]
    every_second = tiny_config(family, layer_types=None, full_attention_interval=2)
    assert recurrent_layers(decoder_config(every_second)) == [0, 2]


def test_experts_of_some_layers():
    """`mlp_only_layers` counts from 0, `decoder_sparse_step` from 1."""

    def sparse(**fields) -> list[int]:
        config = decoder_config(tiny_config("qwen3_next", **fields))
        return [i for i, layer in enumerate(layer_configs(config)) if layer.experts is not None]

    assert sparse(mlp_only_layers=None) == [0, 1, 2]
    assert sparse(mlp_only_layers=[0, 2]) == [1]
    assert sparse(mlp_only_layers=[], decoder_sparse_step=2) == [1]
    assert sparse(num_experts=0) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, r"layer types \['sliding_attention'\] are not supported"),
        ({"linear_num_value_heads": 3}, "3 value heads cannot share 2 key heads evenly"),
        ({"linear_conv_kernel_dim": 1}, "convolution_width is 1; it must be at least 2"),
    ],
)
def test_options_that_are_refused(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(tiny_config(family, **fields))


def test_layer_types_of_another_length():
    hf = tiny_config(TEXT)
    hf.layer_types = hf.layer_types[:2]
    with pytest.raises(ConfigError, match="layer_types has 2 layers; num_hidden_layers is 3"):
        decoder_config(hf)


@pytest.mark.parametrize("name", ["linear_num_key_heads", "full_attention_interval", "decoder_sparse_step"])
def test_sizes_are_checked_first(name):
    with pytest.raises(ConfigError, match=f"'{name}' is 0; it must be an integer from 1"):
        hf_config({"model_type": "qwen3_5", "text_config": {"model_type": TEXT, name: 0}})


@pytest.mark.parametrize("tied", [False, True])
def test_the_outer_config_ties_the_output(tied):
    hf = hf_config({**tiny_config("qwen3_5").to_dict(), "tie_word_embeddings": tied})
    hf.text_config.tie_word_embeddings = not tied
    assert decoder_config(hf).tied == tied


def test_stored_shapes(tmp_path):
    write_tiny_checkpoint(tmp_path, TEXT, attention_bias=True)
    shapes = {name: array.shape for name, array in safetensors.numpy.load_file(tmp_path / WEIGHTS).items()}
    assert shapes["model.layers.0.linear_attn.conv1d.weight"] == (2 * 2 * 6 + 4 * 5, 1, 4)
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == (4 * 2 * 8, 32)
    assert shapes["model.layers.2.self_attn.q_proj.bias"] == (4 * 2 * 8,)


def same_params(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("family", ["qwen3_5", TEXT, "qwen3_next"])
def test_other_parts_of_a_model_are_left_out(family, tmp_path):
    """The model of images, and the layer that predicts several tokens at once; nothing else that is unknown."""
    plain = load_base(write_tiny_checkpoint(tmp_path, family))
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    more = {"mtp.fc.weight": np.ones((2, 2), np.float32)}
    if family != "qwen3_next":
        more["model.visual.blocks.0.norm1.weight"] = np.ones(2, np.float32)
    safetensors.numpy.save_file(tensors | more, tmp_path / WEIGHTS)
    same_params(plain, load_base(tmp_path))
    safetensors.numpy.save_file(tensors | {"model.mtp.weight": np.ones(2, np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"'model\.mtp\.weight'"):
        load_base(tmp_path)


def test_the_language_model_in_a_file_of_the_whole_model(tmp_path):
    plain = load_base(write_tiny_checkpoint(tmp_path, TEXT))
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    renamed = {name.replace("model.", "model.language_model."): tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(renamed, tmp_path / WEIGHTS)
    same_params(plain, load_base(tmp_path))


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_5_moe"])
def test_experts_together_or_apart(family, tmp_path):
    """Files on the hub hold the experts of a layer in two tensors, those that transformers saves one by one."""
    together = load_base(write_tiny_checkpoint(tmp_path, family))
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    apart = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(np.split(own, 2) for own in tensor):
                apart |= {
                    name.replace("gate_up_proj", f"{e}.gate_proj.weight"): gate.copy(),
                    name.replace("gate_up_proj", f"{e}.up_proj.weight"): up.copy(),
                }
        elif name.endswith("experts.down_proj"):
            apart |= {name.replace("down_proj", f"{e}.down_proj.weight"): own.copy() for e, own in enumerate(tensor)}
        else:
            apart[name] = tensor
    assert len(apart) > len(tensors)
    safetensors.numpy.save_file(apart, tmp_path / WEIGHTS)
    same_params(together, load_base(tmp_path))
    missing = next(name for name in apart if name.endswith("experts.4.up_proj.weight"))
    del apart[missing]
    safetensors.numpy.save_file(apart, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of a {family} model .* {missing}"):
        load_base(tmp_path)


def test_the_config_of_a_file(tmp_path):
    """`config.json` of the whole model, with a model of images that is not read."""
    write_tiny_checkpoint(tmp_path, "qwen3_5")
    assert read_config(tmp_path) == decoder_config(tiny_config("qwen3_5"))
