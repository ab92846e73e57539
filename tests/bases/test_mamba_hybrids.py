"""Granite 4 and Falcon-H1: what their configs leave open, and the names and shapes of their stored tensors."""

import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base, read_config
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import layer_configs
from spt_jax.models.decoder import decoder_layout
from spt_jax.testing import tiny_config, write_tiny_checkpoint

GRANITE, FALCON = "granitemoehybrid", "falcon_h1"


def recurrent_layers(config) -> list[int]:
    return [i for i, layer in enumerate(layer_configs(config)) if layer.recurrent is not None]


def test_what_granites_config_leaves_open():
    """All layers are recurrent, without RoPE, and the size of a head follows from the others."""
    config = decoder_config(tiny_config(GRANITE, layer_types=None, mamba_d_head="auto", position_embedding_type=None))
    assert recurrent_layers(config) == [0, 1, 2]
    assert layer_configs(config)[0].mamba.head_size == 8
    assert config.rope is None and config.positions == "none"
    assert decoder_config(tiny_config(GRANITE, position_embedding_type="rope")).rope is not None


@pytest.mark.parametrize("name", ["layer_types", "layers_block_type"])
def test_the_names_of_layer_types_in_older_files(name, tmp_path):
    write_tiny_checkpoint(tmp_path, GRANITE)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["layer_types"]
    fields |= {name: ["mamba", "mamba", "attention"], "position_embedding_type": "nope", "mamba_d_head": "auto"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == decoder_config(tiny_config(GRANITE))
    load_base(tmp_path)


def test_experts_are_optional():
    config = decoder_config(tiny_config(GRANITE))
    assert config.experts.shared_width == 12 and config.experts.scoring == "softmax_of_chosen"
    dense = decoder_config(tiny_config(GRANITE, num_local_experts=0))
    assert dense.experts is None and dense.mlp_width == 12


def test_what_falcons_config_leaves_open():
    fields = dict.fromkeys(("mlp_multipliers", "ssm_multipliers", "mamba_d_ssm"))
    config = decoder_config(tiny_config(FALCON, **fields, mamba_rms_norm=False, mamba_d_head="auto"))
    assert config.mamba.part_scales == (1, 1, 1, 1, 1) and config.mlp_gate_scale == config.mlp_output_scale == 1
    assert config.mamba.value_width == 2 * config.width and config.mamba.head_size == 16
    assert config.mamba.norm == "none"


def test_the_multipliers_of_falcon():
    config = decoder_config(tiny_config(FALCON))
    assert config.mamba.part_scales == (0.6, 1.5, 0.8, 1.2, 0.7)
    assert (config.mamba.input_scale, config.mamba.output_scale) == (0.9, 1.4)
    assert (config.attention_input_scale, config.attention_output_scale, config.key_scale) == (1.3, 0.7, 0.6)
    assert (config.mlp_gate_scale, config.mlp_output_scale) == (1.2, 0.6)
    assert (config.embedding_scale, config.logit_scale) == (3.0, 0.8)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (GRANITE, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (GRANITE, {"layer_types": ["sliding_attention"] * 3}, r"layer types \['sliding_attention'\] are not supported"),
        (GRANITE, {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        (GRANITE, {"mamba_n_groups": 3}, "4 heads cannot be divided into 3 equal groups"),
        (GRANITE, {"time_step_limit": [0.001, math.inf]}, "time_step_limit .* is not supported"),
        (FALCON, {"time_step_limit": [0.0, 0.1]}, "time_step_limit .* is not supported"),
        (FALCON, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (FALCON, {"mlp_multipliers": [1.0]}, "mlp_multipliers has 1 numbers; falcon_h1 needs 2"),
        (FALCON, {"ssm_multipliers": [1.0] * 4}, "ssm_multipliers has 4 numbers; falcon_h1 needs 5"),
        (FALCON, {"key_multiplier": 0.0}, "key_scale is 0.0; it must be a finite number above 0"),
    ],
)
def test_options_that_are_refused(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(tiny_config(family, **fields))


@pytest.mark.parametrize("name", ["mamba_n_heads", "mamba_d_head", "mamba_d_ssm", "mamba_expand"])
def test_sizes_are_checked_first(name):
    with pytest.raises(ConfigError, match=f"'{name}' is 0; it must be an integer from 1"):
        hf_config({"model_type": FALCON, name: 0})


def test_stored_shapes(tmp_path):
    """In the order gate, values, keys, queries, steps."""
    for family, values in ((GRANITE, 32), (FALCON, 24)):
        write_tiny_checkpoint(tmp_path / family, family)
        tensors = safetensors.numpy.load_file(tmp_path / family / "model.safetensors")
        shapes = {name: array.shape for name, array in tensors.items()}
        assert shapes["model.layers.0.mamba.in_proj.weight"] == (2 * values + 2 * 12 + 4, 32)
        assert shapes["model.layers.0.mamba.conv1d.weight"] == (values + 2 * 12, 1, 4)
        assert shapes["model.layers.0.mamba.norm.weight"] == (values,)
        own = layer_params(load_base(tmp_path / family), 0)
        np.testing.assert_array_equal(
            own["step"]["kernel"].T, tensors["model.layers.0.mamba.in_proj.weight"][-4:].astype(np.float32)
        )
        kernel = tensors["model.layers.0.mamba.conv1d.weight"][values : values + 12, 0]
        np.testing.assert_array_equal(own["key_convolution"].T, kernel)


def layer_params(base, layer: int):
    """The parameters of the Mamba-2 part of a layer of the first stack."""
    (stack,) = [tree for name, tree in base.params.items() if name in ("layers", "layers_0")]
    return jax.tree.map(lambda a: np.asarray(a[layer], np.float32), stack["mamba"])


def test_layers_of_falcon_are_in_two_groups():
    layout = decoder_layout(decoder_config(tiny_config(FALCON)))
    assert {name: group.layers for name, group in layout.groups.items()} == {"self": (0, 1), "recurrent": (0, 1)}
