"""Configs of the families that derive from Llama: published sizes, defaults that transformers fills in, refusals."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base
from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.config import layer_configs
from spt_jax.models.decoder import decoder_layout
from spt_jax.testing import tiny_config, write_tiny_checkpoint

# Fields of published config.json files, and the parameters that their model cards and checkpoints count.
PUBLISHED = {
    "gemma-2b": (
        {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
         "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
         "hidden_act": "gelu"},
        2_506_172_416,
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
         "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
         "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000},
        999_885_952,
    ),
    "Phi-3-mini-4k": (
        {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047},
        3_821_079_552,
    ),
    "OLMo-2-1B": (
        {"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16},
        1_484_916_736,
    ),
    "OLMo-1B": (
        {"model_type": "olmo", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
        1_176_764_416,
    ),
    "aya-23-8B": (
        {"model_type": "cohere", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        8_028_033_024,
    ),
    "glm-4-9b-hf": (
        {"model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
         "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2},
        9_399_951_360,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name):
    fields, parameters = PUBLISHED[name]
    shapes = jax.tree.leaves(parameter_shapes(decoder_config(hf_config(fields))))
    assert sum(leaf.size for leaf in shapes) == parameters


def test_gemmas_gelu_is_the_approximate_one():
    assert decoder_config(tiny_config("gemma", hidden_act="gelu")).activation == "gelu_tanh"
    assert decoder_config(tiny_config("gemma")).activation == "gelu_tanh"


def test_gemma3_has_five_layers_with_a_window_and_a_rope_of_their_own():
    config = decoder_config(hf_config(PUBLISHED["gemma-3-1b"][0]))
    assert config.window == 512
    assert [i for i in range(26) if i not in config.window_layers] == [5, 11, 17, 23]
    assert config.rope is not None and config.local_rope is not None
    assert (config.rope.theta, config.local_rope.theta) == (1_000_000.0, 10_000.0)
    # How 4B and larger write the factor of the full layers.
    scaled = {**PUBLISHED["gemma-3-1b"][0], "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = decoder_config(hf_config(scaled))
    assert config.rope is not None and config.local_rope is not None
    assert (config.rope.kind, config.rope.factor, config.local_rope.kind) == ("linear", 8.0, "default")


def test_olmo3_scales_only_full_layers():
    config = decoder_config(tiny_config("olmo3"))
    assert config.window_layers == (0, 1, 2)
    assert config.rope is not None and config.local_rope is not None
    assert (config.rope.kind, config.local_rope.kind) == ("yarn", "default")


def test_layers_without_rope():
    assert decoder_config(tiny_config("cohere2")).no_rope_layers == (3,)
    assert decoder_config(tiny_config("exaone4")).no_rope_layers == (3,)
    whole = decoder_config(tiny_config("exaone4", sliding_window=None, layer_types=["full_attention"] * 4))
    assert whole.no_rope_layers == whole.window_layers == ()


def test_gemma4_has_heads_by_type_of_layer():
    config = decoder_config(tiny_config("gemma4_text"))
    sizes = [(own.head_size, own.kv_heads, own.value_is_key) for own in layer_configs(config)]
    assert sizes == [(8, 2, False), (16, 1, True)] * 2
    assert config.window_layers == (0, 2)


def test_gemma4_layers_that_read_the_keys_and_values_of_others():
    """As those of E2B, whose first 15 of 35 layers have keys and values."""
    types = [*["sliding_attention"] * 4, "full_attention"] * 7
    fields = {"num_hidden_layers": 35, "layer_types": types, "num_kv_shared_layers": 20, "use_double_wide_mlp": True}
    config = decoder_config(tiny_config("gemma4_text", **fields))
    found = [(own.kv_source, own.mlp_width) for own in layer_configs(config)]
    assert found == [(None, 64)] * 15 + [*[(13, 128)] * 4, (14, 128)] * 4
    layers = {name: group.layers for name, group in decoder_layout(config).attention_groups.items()}
    assert layers == {"self": tuple(i for i in range(15) if i % 5 < 4), "full": (4, 9, 14)}


def test_gemma4_tensors_of_keys_that_no_layer_reads(tmp_path):
    """Files hold the keys and values of all layers, those of layers that read others' among them."""
    directory = write_tiny_checkpoint(tmp_path, "gemma4", num_kv_shared_layers=2)
    expected = load_base(directory, dtype="float32").fingerprint
    file, unread = directory / "model.safetensors", np.ones(3, np.float32)
    tensors = safetensors.numpy.load_file(file)
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    more = {f"model.language_model.layers.{i}.self_attn.{name}": unread for i in (2, 3) for name in names}
    safetensors.numpy.save_file(tensors | more, file)
    assert load_base(directory, dtype="float32").fingerprint == expected
    safetensors.numpy.save_file({**tensors, "model.language_model.layers.3.self_attn.x_proj.weight": unread}, file)
    with pytest.raises(CheckpointError, match="x_proj"):
        load_base(directory, dtype="float32")


def test_longrope_limits_the_run_to_the_length_of_its_frequencies():
    """transformers chooses short or long factors by the longest sequence; a compiled program by the run's maximum."""
    short = {"original_max_position_embeddings": 64}
    hf = tiny_config("phi3", **short)
    within, beyond = decoder_config(hf, max_length=64), decoder_config(hf, max_length=65)
    assert (within.max_positions, beyond.max_positions) == (64, 512)
    assert within.rope is not None and beyond.rope is not None
    plain = 1_000.0 ** (-np.arange(6) / 6)
    np.testing.assert_allclose(within.rope.inverse_frequencies(16), plain / within.rope.short_factors, rtol=1e-6)
    np.testing.assert_allclose(beyond.rope.inverse_frequencies(16), plain / beyond.rope.long_factors, rtol=1e-6)
    assert decoder_config(hf) == within
    assert decoder_config(hf, max_length=100) == beyond


def test_hunyuan_stretches_theta_whatever_the_length():
    hf = tiny_config("hunyuan_v1_dense")
    config = decoder_config(hf)
    assert config.rope is not None
    assert (config.rope.kind, config.rope.theta) == ("default", 100.0 * 50.0 ** (12 / 10))
    assert decoder_config(hf, max_length=1000) == config


def test_the_text_part_is_the_text_model():
    inner, outer = decoder_config(tiny_config("gemma3_text")), decoder_config(tiny_config("gemma3"))
    assert dataclasses.replace(outer, family="gemma3_text") == inner


def test_tying_in_either_config():
    """transformers 4 wrote it into text_config, where 5 has a default outside that is true."""
    fields = tiny_config("mistral3").to_dict()
    assert not decoder_config(hf_config({**fields, "tie_word_embeddings": True})).tied
    assert decoder_config(tiny_config("mistral3", tie_word_embeddings=True)).tied


def test_sizes_in_the_text_config_are_checked():
    fields = tiny_config("gemma3").to_dict()
    fields["text_config"]["num_hidden_layers"] = 10**9
    with pytest.raises(ConfigError, match="'num_hidden_layers' is 1000000000; it must be an integer from 1 to 10,000"):
        hf_config(fields)


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "gemma4", "gemma4_unified"])
def test_names_of_the_hub_and_of_the_modules(family, tmp_path):
    """Both are read as the same base, without the tensors of the vision model."""
    directory = write_tiny_checkpoint(tmp_path, family)
    expected = load_base(directory, dtype="float32").fingerprint
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    assert all("language_model" in name or name == "lm_head.weight" for name in tensors)
    for model, head, other in [
        ("language_model.model.", "language_model.lm_head.weight", "vision_tower.x"),
        ("model.language_model.", "lm_head.weight", "model.multi_modal_projector.x"),
        ("language_model.", "lm_head.weight", "model.vision_tower.x"),
    ]:
        renamed = {
            head if name == "lm_head.weight" else model + name.split("model.")[-1]: tensor
            for name, tensor in tensors.items()
        }
        safetensors.numpy.save_file({**renamed, other: np.zeros(3, np.float32)}, file)
        assert load_base(directory, dtype="float32").fingerprint == expected
        safetensors.numpy.save_file({**renamed, "model.speech_tower.x": np.zeros(3, np.float32)}, file)
        with pytest.raises(CheckpointError, match="speech_tower"):
            load_base(directory, dtype="float32")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "gemma with use_bidirectional_attention"),
        ("roberta", {"pad_token_id": 0}, "roberta with pad_token_id 0"),
        ("roberta", {"hidden_act": "relu"}, "roberta with hidden_act .relu."),
        ("electra", {"hidden_act": "relu"}, "electra with hidden_act .relu."),
        ("bert", {"is_decoder": True}, "bert as a decoder"),
        ("bert", {"tie_word_embeddings": False}, "bert with tie_word_embeddings false"),
        ("albert", {"num_hidden_groups": 2}, "several groups"),
        ("albert", {"embedding_size": 32}, "embedding_size equal to hidden_size"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 2}, "deberta-v2 with conv_groups 2 is not supported"),
        ("deberta-v2", {"conv_kernel_size": 4}, "over 4 tokens is not supported; their number must be odd"),
        ("deberta-v2", {"embedding_size": 16}, "an embedding_size other than hidden_size"),
        ("deberta-v2", {"attention_head_size": 16}, "attention_head_size 16"),
        ("deberta-v2", {"norm_rel_ebd": "rms"}, "norm_rel_ebd 'rms'"),
        ("deberta-v2", {"pos_att_type": "c2p|p2p"}, r"pos_att_type 'c2p.p2p'"),
        ("deberta-v2", {"pos_att_type": []}, "no term for distances"),
        ("deberta-v2", {"position_buckets": 2}, "2 embeddings of distances are too few"),
        ("deberta-v2", {"max_relative_positions": 5}, "max_distance is 5; it must be above 5"),
        ("modernbert", {"classifier_bias": True}, "modernbert needs the bias"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ("gemma3", {"final_logit_softcapping": 5.0}, "gemma3 with final_logit_softcapping"),
        ("mistral3", {"model_type": "llama"}, "of type 'llama' is not supported; supported are mistral"),
        ("cohere", {"logit_scale": None}, "without a logit_scale"),
        ("cohere2", {"sliding_window": None}, "sliding_window is not set"),
        ("ministral", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "pad_token_id": None}, "needs pad_token_id"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "pad_token_id": 319, "vocab_size_per_layer_input": 300},
         "virtual_id is 319; it must be one of the 300 rows"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}, "300, below.*320"),
        ("gemma4_text", {"num_kv_shared_layers": 3}, "is 3, but no layer of type 'full_attention'"),
        ("gemma4_text", {"num_kv_shared_layers": 5}, "num_kv_shared_layers is 5"),
        ("gemma4_text", {"enable_moe_block": True}, "enable_moe_block needs num_experts"),
        ("gemma4_text", {"enable_moe_block": True, "hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
        ("gemma4_text", {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 24}}}, "different heads"),
    ],
)  # fmt: skip
def test_options_that_are_refused(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(tiny_config(family, **fields))


def test_rotating_a_part_of_each_head_is_refused_where_transformers_ignores_it():
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    for family in ("gemma", "olmo2", "cohere"):
        with pytest.raises(ConfigError, match=f"partial_rotary_factor.* not supported for {family}"):
            decoder_config(tiny_config(family, rope_parameters=rope))
    assert decoder_config(tiny_config("glm", rope_parameters=rope)).rope.fraction == 0.5
