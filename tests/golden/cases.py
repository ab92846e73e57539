"""The models whose logits are compared with transformers': live in tests/parity, stored in tests/golden."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "logits.safetensors"
LENGTH = 128
KEPT = (0, 1, 6, 7, 8, 31, 63, 64, 100, 127)  # positions whose logits are stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny checkpoint: `write_tiny_checkpoint(directory, family, seed=seed, **overrides)`."""

    name: str
    family: str
    seed: int = 0
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_length: int | None = None  # for load_base
    depends_on_length: bool = False  # transformers' frequencies change with the longest sequence seen
    attention: str = "eager"  # transformers' implementation

    def __str__(self) -> str:
        return self.name


def _case(
    name: str,
    family: str,
    *,
    max_length: int | None = None,
    depends_on_length: bool = False,
    attention: str = "eager",
    **overrides: Any,
):
    return Case(
        name=name,
        family=family,
        seed=len(name),
        overrides=overrides,
        max_length=max_length,
        depends_on_length=depends_on_length,
        attention=attention,
    )


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **options, "rope_type": kind}, "head_dim": 16}


_DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

_SEQUENTIAL = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}

_TWICE = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# Scores without a cap grow with the width, as these norms scale by about 2: those of a wider model saturate the
# softmax, and the rounding errors of float32 on either side reach 1e-4 on some processors. A larger divisor of
# the scores helps as well.
NARROW = {"hidden_size": 16, "num_hidden_layers": 2}
_OWN_TERMS = {"share_att_key": False, "norm_rel_ebd": "none"}
# As Gemma 4 E2B: each layer has embeddings of its own, and the last two read the keys and values of layers 2 and 3.
# With a smaller epsilon, norms of the few numbers of an embedding amplify the rounding errors of both sides.
E2B = {
    "attention_k_eq_v": False,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 328,
    "head_dim": 4,
    "global_head_dim": 8,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}

A4B = {
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
}

CASES = (
    _case("llama", "llama"),
    _case("llama tied", "llama", tie_word_embeddings=True),
    _case("llama biases", "llama", attention_bias=True, mlp_bias=True),
    _case("llama one key/value head", "llama", num_key_value_heads=1),
    _case("llama every head its own keys", "llama", num_key_value_heads=4),
    _case("llama tanh-gelu", "llama", hidden_act="gelu_pytorch_tanh"),
    _case("llama theta", "llama", **_rope("default", rope_theta=500_000.0)),
    _case("llama linear", "llama", **_rope("linear", factor=3.0)),
    _case("llama llama3", "llama", **_rope("llama3", factor=8.0, **_LLAMA3)),
    _case("llama yarn", "llama", **_rope("yarn", **_YARN)),
    _case("llama yarn betas", "llama", **_rope("yarn", beta_fast=4.0, beta_slow=0.5, truncate=False, **_YARN)),
    _case("llama yarn attention factor", "llama", **_rope("yarn", attention_factor=0.7, **_YARN)),
    _case("llama yarn mscale", "llama", **_rope("yarn", mscale=2.0, mscale_all_dim=0.5, **_YARN)),
    _case("llama dynamic within", "llama", **_rope("dynamic", factor=4.0)),
    _case(
        "llama dynamic beyond",
        "llama",
        max_length=LENGTH,
        depends_on_length=True,
        max_position_embeddings=48,
        **_rope("dynamic", factor=4.0),
    ),
    _case("mistral", "mistral"),
    _case("mistral no window, wide heads", "mistral", sliding_window=None, head_dim=12),
    _case("qwen2", "qwen2"),
    _case("qwen2 untied", "qwen2", tie_word_embeddings=False),
    _case("qwen2 window", "qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    _case("qwen3", "qwen3"),
    _case("qwen3 untied, biases", "qwen3", tie_word_embeddings=False, attention_bias=True),
    _case("qwen3 window", "qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=2),
    _case("qwen3_5_text", "qwen3_5_text"),
    _case("qwen3_5_text tied, biases", "qwen3_5_text", tie_word_embeddings=True, attention_bias=True),
    _case("qwen3_5_text recurrent only", "qwen3_5_text", layer_types=["linear_attention"] * 3),
    _case("qwen3_5_text kernel of 2", "qwen3_5_text", linear_conv_kernel_dim=2, linear_num_key_heads=4),
    _case("qwen3_5", "qwen3_5"),
    _case("qwen3_5 tied", "qwen3_5", tie_word_embeddings=True),
    _case("qwen3_5_moe_text", "qwen3_5_moe_text"),
    _case("qwen3_5_moe", "qwen3_5_moe"),
    _case("qwen3_next", "qwen3_next"),
    _case("qwen3_next experts everywhere", "qwen3_next", mlp_only_layers=[], norm_topk_prob=True),
    _case("qwen3_next every second", "qwen3_next", mlp_only_layers=[], decoder_sparse_step=2),
    _case("smollm3", "smollm3"),
    _case("smollm3 untied, biases", "smollm3", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    _case("smollm3 window", "smollm3", use_sliding_window=True, sliding_window=9),
    _case("gemma2", "gemma2"),
    _case("gemma2 untied, biases", "gemma2", tie_word_embeddings=False, attention_bias=True),
    _case(
        "gemma2 no caps",
        "gemma2",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=1024,
    ),
    _case("deepseek_v2", "deepseek_v2"),
    _case("deepseek_v2 query latent, greedy", "deepseek_v2", q_lora_rank=14, topk_method="greedy", n_shared_experts=1),
    _case("deepseek_v2 dense, biases", "deepseek_v2", first_k_dense_replace=3, attention_bias=True, mlp_bias=True),
    _case("deepseek_v3", "deepseek_v3"),
    _case("deepseek_v3 no yarn, no renormalization", "deepseek_v3", norm_topk_prob=False, rope_parameters=_DEFAULT),
    _case("gemma", "gemma", **NARROW),
    _case("gemma untied, biases", "gemma", tie_word_embeddings=False, attention_bias=True, **NARROW),
    _case("gemma3_text", "gemma3_text"),
    _case("gemma3_text cap", "gemma3_text", final_logit_softcapping=4.0),
    _case("gemma3_text no full layer", "gemma3_text", layer_types=["sliding_attention"] * 4),
    _case("gemma3", "gemma3"),
    _case("gemma3 untied, biases", "gemma3", tie_word_embeddings=False, attention_bias=True),
    _case("phi3", "phi3"),
    _case("phi3 long", "phi3", max_length=LENGTH, depends_on_length=True, original_max_position_embeddings=48),
    _case("phi3 no window, plain rope", "phi3", sliding_window=None, rope_parameters={"rope_type": "default"}),
    _case("olmo2", "olmo2"),
    _case("olmo2 biases", "olmo2", attention_bias=True),
    _case("olmo3", "olmo3"),
    _case("granite", "granite"),
    _case("granite untied, biases", "granite", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    _case("ministral", "ministral"),
    _case("ministral3", "ministral3"),
    _case("ministral3 window", "ministral3", sliding_window=9),
    _case("mistral3", "mistral3"),
    _case(
        "mistral3 tied, mistral",
        "mistral3",
        tie_word_embeddings=True,
        model_type="mistral",
        sliding_window=9,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
    ),
    _case("cohere", "cohere"),
    _case("cohere biases, no norms", "cohere", use_qk_norm=False, attention_bias=True, tie_word_embeddings=False),
    _case("cohere2", "cohere2"),
    _case("glm", "glm"),
    _case("glm no biases", "glm", attention_bias=False),
    _case("glm4", "glm4"),
    _case("exaone4", "exaone4"),
    _case("exaone4 no window", "exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
    _case("seed_oss", "seed_oss"),
    _case("seed_oss biases", "seed_oss", attention_out_bias=True, mlp_bias=True),
    _case("arcee", "arcee"),
    _case("arcee biases", "arcee", attention_bias=True, mlp_bias=True),
    _case("olmo", "olmo"),
    _case("olmo biases, unclipped", "olmo", clip_qkv=None, attention_bias=True),
    _case("hunyuan_v1_dense", "hunyuan_v1_dense"),
    _case("gemma4_text", "gemma4_text"),
    _case("gemma4_text own values, untied", "gemma4_text", attention_k_eq_v=False, tie_word_embeddings=False),
    _case("gemma4_text E2B", "gemma4_text", **E2B),
    _case(
        "gemma4_text E2B keys as values",
        "gemma4_text",
        **E2B | {"attention_k_eq_v": True, "attention_bias": True, "layer_types": _TWICE, "num_kv_shared_layers": 3},
    ),
    _case("gemma4_text A4B", "gemma4_text", **A4B),
    _case("gemma4", "gemma4"),
    _case("gemma4 E2B", "gemma4", **E2B),
    _case("gemma4_unified_text", "gemma4_unified_text"),
    _case(
        "gemma4_unified_text reading layers", "gemma4_unified_text", num_kv_shared_layers=2, use_double_wide_mlp=True
    ),
    _case("gemma4_unified", "gemma4_unified"),
    _case("gpt2", "gpt2"),
    _case("gpt2 untied, exact gelu", "gpt2", tie_word_embeddings=False, activation_function="gelu", n_inner=48),
    _case("qwen3_moe", "qwen3_moe"),
    _case(
        "qwen3_moe window, experts everywhere",
        "qwen3_moe",
        num_hidden_layers=2,
        decoder_sparse_step=1,
        norm_topk_prob=False,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
    ),
    _case("mixtral", "mixtral"),
    _case("mixtral no window, one expert", "mixtral", sliding_window=None, num_experts_per_tok=1),
    _case("olmoe", "olmoe"),
    _case("olmoe unclipped, biases", "olmoe", clip_qkv=None, attention_bias=True, norm_topk_prob=True),
    _case("qwen2_moe", "qwen2_moe"),
    _case("qwen2_moe no biases", "qwen2_moe", qkv_bias=False, mlp_only_layers=[3], norm_topk_prob=False),
    _case("gpt_oss", "gpt_oss"),
    _case("gpt_oss slope, full attention", "gpt_oss", swiglu_alpha=0.9, layer_types=["full_attention"] * 2),
    _case("granitemoe", "granitemoe"),
    _case("granitemoeshared", "granitemoeshared"),
    _case("granitemoeshared biases", "granitemoeshared", attention_bias=True, shared_intermediate_size=0),
    _case("granitemoehybrid", "granitemoehybrid"),
    _case(
        "granitemoehybrid no experts, biases",
        "granitemoehybrid",
        num_local_experts=0,
        attention_bias=True,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        mamba_chunk_size=32,
    ),
    _case(
        "granitemoehybrid rope, untied",
        "granitemoehybrid",
        position_embedding_type="rope",
        tie_word_embeddings=False,
        mamba_n_groups=1,
        mamba_d_conv=2,
    ),
    _case(
        "granitemoehybrid attention only",
        "granitemoehybrid",
        position_embedding_type="rope",
        num_local_experts=0,
        layer_types=["full_attention"] * 3,
    ),
    _case("falcon_h1", "falcon_h1"),
    _case("falcon_h1 no norm, tied", "falcon_h1", mamba_rms_norm=False, tie_word_embeddings=True, mamba_d_ssm=None),
    _case(
        "falcon_h1 norm before gate, biases",
        "falcon_h1",
        mamba_norm_before_gate=True,
        attention_bias=True,
        mlp_bias=True,
        mamba_proj_bias=True,
        projectors_bias=True,
        mamba_n_groups=1,
    ),
    _case("glm4_moe", "glm4_moe"),
    _case(
        "glm4_moe plain, experts everywhere",
        "glm4_moe",
        num_hidden_layers=2,
        first_k_dense_replace=0,
        use_qk_norm=False,
        attention_bias=False,
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
        partial_rotary_factor=1.0,
    ),
    _case("bloom", "bloom"),
    _case("bloom untied, 4 heads", "bloom", tie_word_embeddings=False, hidden_size=32, n_head=4),
    _case("gpt_neox", "gpt_neox"),
    _case("gpt_neox sequential", "gpt_neox", use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
    _case("opt", "opt"),
    _case("opt maps, sums", "opt", word_embed_proj_dim=24, do_layer_norm_before=False),
    _case("falcon", "falcon"),
    _case("falcon one norm, untied", "falcon", num_ln_in_parallel_attn=1, tie_word_embeddings=False, num_kv_heads=4),
    _case("falcon multi-query", "falcon", new_decoder_architecture=False, bias=False),
    # Eager attention of transformers 5.24 adds the bias twice.
    _case("falcon alibi", "falcon", attention="sdpa", num_attention_heads=16, num_kv_heads=16, **_SEQUENTIAL),
    _case("gpt_bigcode", "gpt_bigcode"),
    _case("gpt_bigcode every head its own keys", "gpt_bigcode", multi_query=False, scale_attn_weights=False),
    _case("gptj", "gptj"),
    _case("gpt_neo", "gpt_neo"),
    _case("phi", "phi"),
    _case("stablelm", "stablelm"),
    _case("stablelm parallel", "stablelm", use_parallel_residual=True, use_qkv_bias=False, qk_layernorm=False),
    _case("starcoder2", "starcoder2"),
    _case("starcoder2 no biases", "starcoder2", use_bias=False, sliding_window=None, tie_word_embeddings=False),
    _case("bert", "bert"),
    _case("bert relu", "bert", hidden_act="relu"),
    _case("roberta", "roberta"),
    _case("xlm-roberta", "xlm-roberta"),
    _case("distilbert", "distilbert"),
    _case("electra", "electra"),
    _case("electra one width", "electra", embedding_size=32),
    _case("albert", "albert"),
    _case("deberta-v2", "deberta-v2"),
    _case(
        "deberta-v2 maps of their own, no buckets, learned positions",
        "deberta-v2",
        share_att_key=False,
        position_buckets=-1,
        norm_rel_ebd="none",
        position_biased_input=True,
        type_vocab_size=2,
    ),
    _case("deberta-v2 convolution", "deberta-v2", conv_kernel_size=3, conv_act="gelu"),
    _case("deberta-v2 wide convolution", "deberta-v2", conv_kernel_size=5, num_hidden_layers=1, **_OWN_TERMS),
    _case("deberta-v2 one term", "deberta-v2", share_att_key=False, pos_att_type=["p2c"], max_relative_positions=-1),
    _case("modernbert", "modernbert"),
    _case(
        "modernbert untied, biases, every second full",
        "modernbert",
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        norm_bias=True,
        decoder_bias=False,
        layer_types=["full_attention", "sliding_attention"] * 3,
        num_hidden_layers=6,
        classifier_pooling="mean",
        tie_word_embeddings=False,
    ),
    _case("gemma3_text encoder", "gemma3_text", use_bidirectional_attention=True, sliding_window=14),
    _case("opt plain", "opt", tie_word_embeddings=False, enable_bias=False, layer_norm_elementwise_affine=False),
)


def precise(model: Any) -> Any:
    """Lets the recurrent layers of transformers' model go token by token; their rule for chunks rounds more."""
    for module in model.modules():
        if hasattr(module, "torch_chunk_gated_delta_rule"):
            module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule
    return model


def token_ids(case: Case) -> np.ndarray:
    """One row of ids, int32 [LENGTH], that no control token is among."""
    return np.random.default_rng(1000 + case.seed).integers(3, 320, LENGTH).astype(np.int32)
