"""Hugging Face configs as decoder shapes: published sizes, RoPE by its formulas, and options that are refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import transformers

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig
from spt_jax.testing import tiny_config

# Fields of published config.json files, and the parameters that their model cards and checkpoints count.
PUBLISHED = {
    "Llama-2-7b": (
        "llama",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32},
        6_738_415_616,
    ),
    "Llama-3.2-1B": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        "mistral",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        596_049_920,
    ),
    "SmolLM2-135M": (
        "llama",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        134_515_008,
    ),
    "SmolLM3-3B": (
        "smollm3",
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
         "num_attention_heads": 16, "num_key_value_heads": 4, "no_rope_layers": None},
        3_075_098_624,
    ),
    "gemma-2-2b": (
        "gemma2",
        {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        2_614_341_888,
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        124_439_808,
    ),
    "bloom-560m": (
        "bloom",
        {"vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16},
        559_214_592,
    ),
    "pythia-410m": (
        "gpt_neox",
        {"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "max_position_embeddings": 2048},
        405_334_016,
    ),
    "opt-1.3b": (
        "opt",
        {"vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048},
        1_315_753_984,  # its two unused rows of positions left out
    ),
    "falcon-7b": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
         "num_kv_heads": 71, "ffn_hidden_size": None, "new_decoder_architecture": False, "bias": False},
        6_921_720_704,
    ),
    "falcon-40b": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
         "num_kv_heads": 8, "ffn_hidden_size": None, "bias": False},
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        "falcon",
        {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
         "num_kv_heads": 32, "ffn_hidden_size": None, "alibi": True, "new_decoder_architecture": False,
         "multi_query": False, "parallel_attn": False},
        1_311_625_216,
    ),
    "gpt-j-6b": (
        "gptj",
        {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None, "rotary_dim": 64,
         "n_positions": 2048},
        6_050_882_784,
    ),
    "phi-2": (
        "phi",
        {"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": None, "partial_rotary_factor": 0.4},
        2_779_683_840,
    ),
    "starcoder2-3b": (
        "starcoder2",
        {"vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
         "num_attention_heads": 24, "num_key_value_heads": 2, "sliding_window": 4096},
        3_030_371_328,
    ),
    "stablelm-2-1_6b": (
        "stablelm",
        {"vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
         "num_attention_heads": 32, "num_key_value_heads": 32, "qk_layernorm": False},
        1_644_515_328,
    ),
    "gpt-neo-1.3B": (
        "gpt_neo",
        {"vocab_size": 50257, "hidden_size": 2048, "num_layers": 24, "num_heads": 16, "intermediate_size": None,
         "attention_types": [[["global", "local"], 12]], "window_size": 256, "max_position_embeddings": 2048},
        1_315_575_808,
    ),
    "starcoder": (
        "gpt_bigcode",
        {"vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576, "n_positions": 8192},
        15_517_456_384,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name):
    family, fields, parameters = PUBLISHED[name]
    config = decoder_config(tiny_config(family, **fields))
    shapes = jax.tree.leaves(parameter_shapes(config))
    assert sum(leaf.size for leaf in shapes) == parameters
    matrices = config.matmul_parameters + config.vocab_size * config.width * (1 if config.tied else 2)
    assert 0.99 * parameters < matrices <= parameters


def test_smollm3_leaves_out_rope_in_every_fourth_layer():
    config = decoder_config(tiny_config("smollm3", num_hidden_layers=9, no_rope_layers=None))
    assert config.no_rope_layers == (3, 7)


def test_windows_of_each_family():
    assert decoder_config(tiny_config("mistral")).window_layers == (0, 1, 2)
    assert decoder_config(tiny_config("mistral", sliding_window=None)).window_layers == ()
    assert decoder_config(tiny_config("qwen2")).window_layers == ()
    late = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    assert decoder_config(tiny_config("qwen2", **late)).window_layers == (2,)
    assert decoder_config(tiny_config("qwen3", **late)).window == 5


def test_leftover_fields_of_other_families_are_no_options():
    """Transformers' Llama has no window and its Qwen2 no output bias, whatever else stands in config.json."""
    assert decoder_config(tiny_config("llama", sliding_window=4)) == decoder_config(tiny_config("llama"))
    assert decoder_config(tiny_config("qwen2", attention_bias=True)) == decoder_config(tiny_config("qwen2"))


def test_bloom_has_positions_as_trained_or_as_its_config_says():
    assert decoder_config(tiny_config("bloom", seq_length=None)).max_positions == 2048
    assert decoder_config(tiny_config("bloom", seq_length=512)).max_positions == 512


def test_part_of_a_head_that_pythia_rotates():
    """transformers fills in a quarter where config.json says nothing."""
    fields = {"hidden_size": 64, "num_attention_heads": 2}
    for options, size in (({"rotary_pct": None}, 8), ({}, 8), ({"rotary_pct": 0.5}, 16), ({"rotary_pct": 1.0}, 32)):
        chosen = {name: value for name, value in options.items() if value is not None}
        hf = transformers.GPTNeoXConfig(**fields, **chosen)
        assert decoder_config(hf).rope.rotated_size(32) == size


def test_opt_350m():
    published = {"word_embed_proj_dim": 512, "hidden_size": 1024, "do_layer_norm_before": False}
    config = decoder_config(tiny_config("opt", **published))
    assert (config.input_width, config.width, config.norm_place, config.final_norm) == (512, 1024, "sum", False)
    assert decoder_config(tiny_config("opt")).embedding_width is None
    assert not decoder_config(tiny_config("opt", _remove_final_layer_norm=True)).final_norm


def test_norms_and_heads_of_the_falcons():
    config = decoder_config(tiny_config("falcon"))
    assert (config.kv_heads, config.parallel, config.shared_norm) == (2, True, False)
    one = decoder_config(tiny_config("falcon", num_ln_in_parallel_attn=1))
    assert (one.parallel, one.shared_norm) == (True, True)
    seven = decoder_config(tiny_config("falcon", new_decoder_architecture=False, num_kv_heads=4))
    assert (seven.kv_heads, seven.parallel, seven.shared_norm) == (1, True, True)
    alibi = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True}
    small = decoder_config(tiny_config("falcon", num_kv_heads=None, **alibi))
    assert (small.kv_heads, small.parallel, small.shared_norm, small.rope) == (4, False, False, None)
    assert small.biased and small.alibi_scale == 8**-0.5


@pytest.mark.parametrize("head_size", [2, 6, 48, 80, 98, 256])
def test_gptj_rotates_exactly_its_rotary_dim(head_size):
    for size in range(2, head_size + 1, 2):
        config = decoder_config(tiny_config("gptj", n_embd=head_size, n_head=1, rotary_dim=size))
        assert config.rope.rotated_size(head_size) == size


def test_default_parts_of_a_head():
    """transformers fills them in where config.json says nothing."""
    assert decoder_config(transformers.PhiConfig()).rope.fraction == 0.5
    assert decoder_config(transformers.StableLmConfig()).rope.fraction == 0.25


def test_layers_of_gpt_neo():
    fields = tiny_config("gpt_neo").to_dict()
    assert decoder_config(hf_config(fields)).window_layers == (1,)
    published = fields | {"num_layers": 24, "attention_types": [[["global", "local"], 12]]}
    published.pop("attention_layers")
    assert decoder_config(hf_config(published)).window_layers == tuple(range(1, 24, 2))
    for wrong in ([[["global"], 10**12]], [["global", 3]], [[["global"]]], 7, []):
        with pytest.raises(ConfigError, match=r"'attention_types' is .* must be a list of pairs"):
            hf_config(fields | {"attention_types": wrong})


@pytest.mark.parametrize(
    ("family", "name"),
    [("bloom", "n_embed"), ("bloom", "seq_length"), ("opt", "ffn_dim"), ("opt", "word_embed_proj_dim"),
     ("gptj", "rotary_dim"), ("falcon", "num_kv_heads"), ("falcon", "ffn_hidden_size"), ("gpt_neo", "num_layers"),
     ("gpt_neo", "num_heads"), ("gpt_neo", "window_size")],
)  # fmt: skip
def test_sizes_are_checked_before_transformers_reads_them(family, name):
    fields = tiny_config(family).to_dict()
    for wrong in (10**15, -3, "wide"):
        with pytest.raises(ConfigError, match=f"'{name}' is .* it must be an integer"):
            hf_config(fields | {name: wrong})


def rope(kind, **options):
    fields = {"rope_type": kind, "rope_theta": 10_000.0, **options}
    return decoder_config(tiny_config(rope_parameters=fields, head_dim=64)).rope


PLAIN = 10_000.0 ** (-np.arange(32) / 32)


def test_default_and_linear_frequencies():
    np.testing.assert_allclose(rope("default").inverse_frequencies(64), PLAIN, rtol=1e-6)
    np.testing.assert_allclose(rope("linear", factor=4.0).inverse_frequencies(64), PLAIN / 4, rtol=1e-6)


def test_llama3_bands():
    """Short waves stay, long ones are stretched by the factor, those between lie between."""
    scaled = RopeConfig(kind="llama3", theta=500_000.0, factor=32.0, original_max_positions=8192).inverse_frequencies(
        64
    )
    plain = 500_000.0 ** (-np.arange(32) / 32)
    wave = 2 * math.pi / plain
    np.testing.assert_allclose(scaled[wave < 2048], plain[wave < 2048], rtol=1e-6)
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 32, rtol=1e-6)
    between = (wave > 2048) & (wave < 8192)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 32))


def test_yarn_bands_and_attention_factor():
    """Peng et al. 2023: more than 32 turns within the original length stay, fewer than one are stretched."""
    config = RopeConfig(kind="yarn", theta=10_000.0, factor=8.0, original_max_positions=4096, truncate=False)
    scaled, turns = config.inverse_frequencies(64), 4096 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns > 32], PLAIN[turns > 32], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], PLAIN[turns < 1] / 8, rtol=1e-6)
    original = {"factor": 8.0, "original_max_position_embeddings": 16}
    assert rope("yarn", **original).attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    assert rope("yarn", **original, attention_factor=0.6).attention_factor == 0.6
    both = rope("yarn", **original, mscale=2.0, mscale_all_dim=1.0).attention_factor
    assert both == pytest.approx((0.2 * math.log(8) + 1) / (0.1 * math.log(8) + 1))


def test_dynamic_frequencies_depend_on_the_length_of_the_run():
    fields = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    hf = tiny_config(rope_parameters=fields, head_dim=64)
    for length in (None, 20, 128):
        np.testing.assert_allclose(decoder_config(hf, max_length=length).rope.inverse_frequencies(64), PLAIN, rtol=1e-6)
    assert decoder_config(hf, max_length=20) == decoder_config(hf)
    theta = 10_000.0 * (2 * 512 / 128 - 1) ** (64 / 62)
    longer = decoder_config(hf, max_length=512)
    np.testing.assert_allclose(longer.rope.inverse_frequencies(64), theta ** (-np.arange(32) / 32), rtol=1e-6)
    assert longer.max_positions == 512


def test_rope_scaling_beside_rope_theta():
    """How configs were written before transformers 5, with whole numbers for floats."""
    old = tiny_config(rope_theta=50_000, rope_scaling={"type": "linear", "factor": 2}, head_dim=64)
    assert decoder_config(old).rope == dataclasses.replace(rope("linear", factor=2.0), theta=50_000.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "axial"}, "'axial' is not supported"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4}, "'longrope' needs 'long_factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4}, "has 3 short and 4 long"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": ["2"] * 4}, "must be a list of numbers"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_type": "linear"}, "'linear' needs 'factor'"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "'llama3' needs 'high_freq_factor'"),
    ],
)
def test_rope_that_is_refused(fields, message):
    hf = tiny_config()
    hf.rope_parameters = {"rope_theta": 10_000.0, **fields}
    with pytest.raises(ConfigError, match=message):
        decoder_config(hf)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"hidden_act": "relu6"}, "activation 'relu6' is not supported; supported are silu"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("falcon", {"parallel_attn": False}, "without parallel_attn"),
        ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3"),
        ("falcon", {"num_ln_in_parallel_attn": 2, "new_decoder_architecture": False}, "needs new_decoder_architecture"),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False}, "num_kv_heads is 2"),
        ("falcon", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("starcoder2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("gptj", {"rotary_dim": 32}, "rotary_dim 32 and heads of size 16"),
        ("gpt_neo", {"attention_types": [[["global", "local", "dilated"], 1]]}, "'dilated' are not supported"),
        ("gpt_bigcode", {"add_cross_attention": True, "multi_query": False}, "add_cross_attention"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3, "sliding_window": 3, "use_sliding_window": True},
         "'chunked_attention'"),
    ],
)  # fmt: skip
def test_options_that_are_refused(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        decoder_config(tiny_config(family, **fields))


def test_configs_can_be_static_arguments_of_jit():
    one, two = (decoder_config(tiny_config("smollm3")) for _ in range(2))
    assert isinstance(one, DecoderConfig)
    assert hash(one) == hash(two)
