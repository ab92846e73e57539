"""Fields of published `config.json` files, and how many parameters the models have.

Fields that have no effect on the shapes of parameters are left out, unless a family refuses its config without them.
tests/parity compares the numbers with those of transformers' models.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import decoder_config, hf_config
from spt_jax.models.config import DecoderConfig
from spt_jax.models.model import Params


@dataclasses.dataclass(frozen=True)
class Published:
    """A released model.

    Attributes:
      family: `model_type` in its `config.json`.
      fields: other fields; those of the language model if `config.json` has them in `text_config`.
      parameters: of the language model, with tied matrices counted once.
      unread: how many of them the decoder does not have: the first two rows of positions of OPT and RoBERTa, which no
        token uses; for ALBERT, whose layers share parameters, minus those of the copies.
      stated: whether the model's card or its files state this number; otherwise it is that of transformers' model.
      active: billions of parameters that a token is multiplied with, as stated on the card of a model with experts.
      in_text_config: whether the fields are those of the language model inside a model that also reads images.
    """

    family: str
    fields: Mapping[str, Any]
    parameters: int
    unread: int = 0
    stated: bool = True
    active: float | None = None
    in_text_config: bool = False

    def config_json(self) -> dict[str, Any]:
        """Returns `config.json`."""
        if not self.in_text_config:
            return {"model_type": self.family, **self.fields}
        tied = self.fields["tie_word_embeddings"]
        return {"model_type": self.family, "text_config": dict(self.fields), "tie_word_embeddings": tied}

    def config(self) -> DecoderConfig:
        """Returns the config of the decoder."""
        return decoder_config(hf_config(self.config_json()))


def _bert(
    vocabulary: int, width: int, mlp: int, layers: int, heads: int, positions: int, **others: Any
) -> dict[str, Any]:
    """Returns the fields that most families of encoders name alike."""
    fields = _sizes(vocabulary, width, mlp, layers, heads, heads, max_position_embeddings=positions, **others)
    return {name: value for name, value in fields.items() if name != "num_key_value_heads"}


def _sizes(vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv: int, **others: Any) -> dict[str, Any]:
    """Returns the fields that most families name alike. `others` are further ones, by their own names."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **others,
    }


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@functools.cache
def shapes_of(name: str) -> Params:
    """Returns the shapes of the parameters of a released model's decoder."""
    return parameter_shapes(PUBLISHED[name].config())


_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_GPT_OSS_20B = _sizes(201088, 2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32, num_experts_per_tok=4)
_GEMMA_4_31B = _sizes(
    262144, 5376, 21504, 60, 32, 16, head_dim=256, global_head_dim=512, num_global_key_value_heads=4,
    attention_k_eq_v=True, hidden_size_per_layer_input=0, **_TIED,
)  # fmt: skip
_DEBERTA_V3 = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}  # fmt: skip
_QWEN35_9B = _sizes(
    248320, 4096, 12288, 32, 16, 4, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, model_type="qwen3_5_text", **_UNTIED,
)  # fmt: skip
_QWEN35_35B = _without(_QWEN35_9B, "intermediate_size") | {
    "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
_GRANITE_4 = ["attention" if i % 10 == 5 else "mamba" for i in range(40)]
_MINISTRAL_3_3B = _sizes(131072, 3072, 9216, 26, 32, 8, head_dim=128, **_TIED)

# fmt: off
PUBLISHED: Mapping[str, Published] = {
    "AFM-4.5B": Published(
        "arcee", _sizes(128004, 2560, 18432, 36, 20, 4, head_dim=128, **_UNTIED), 4_619_184_640, stated=False,
    ),
    "bloom-560m": Published(
        "bloom", {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}, 559_214_592,
    ),
    "bloomz-7b1": Published(
        "bloom", {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}, 7_069_016_064,
    ),
    "c4ai-command-r-v01": Published("cohere", _sizes(256000, 8192, 22528, 40, 64, 64), 34_980_831_232),
    "aya-23-8B": Published("cohere", _sizes(256000, 4096, 14336, 32, 32, 8), 8_028_033_024),
    "c4ai-command-r7b-12-2024": Published(
        "cohere2", _sizes(256000, 4096, 14336, 32, 32, 8, head_dim=128), 8_028_033_024, stated=False,
    ),
    "DeepSeek-V2-Lite": Published(
        "deepseek_v2", _sizes(102400, 2048, 10944, 27, 16, 16, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, topk_method="greedy", n_group=1,
        topk_group=1), 15_706_484_224, active=2.4,
    ),
    "DeepSeek-V3": Published(
        "deepseek_v3", _sizes(129280, 7168, 18432, 61, 128, 128, moe_intermediate_size=2048,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, kv_lora_rank=512, q_lora_rank=1536,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=3, n_group=8,
        topk_group=4), 671_026_419_200,
    ),
    "EXAONE-4.0-1.2B": Published(
        "exaone4", _sizes(102400, 2048, 4096, 30, 32, 8, sliding_window=None, layer_types=["full_attention"] * 30,
        **_TIED), 1_279_391_488, stated=False,
    ),
    "falcon-7b": Published(
        "falcon", {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": True, "parallel_attn": True, "bias": False}, 6_921_720_704,
    ),
    "falcon-40b": Published(
        "falcon", {"vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_kv_heads": 8, "new_decoder_architecture": True, "bias": False}, 41_303_293_952,
    ),
    "gemma-2b": Published("gemma", _sizes(256000, 2048, 16384, 18, 8, 1, head_dim=256), 2_506_172_416),
    "gemma-2-2b": Published("gemma2", _sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    "gemma-2-9b": Published("gemma2", _sizes(256000, 3584, 14336, 42, 16, 8, head_dim=256), 9_241_705_984),
    "gemma-3-270m": Published("gemma3_text", _sizes(262144, 640, 2048, 18, 4, 1, head_dim=256), 268_098_176),
    "gemma-3-1b-pt": Published("gemma3_text", _sizes(262144, 1152, 6912, 26, 4, 1, head_dim=256), 999_885_952),
    "gemma-3-4b-pt": Published(
        "gemma3", _sizes(262208, 2560, 10240, 34, 8, 4, head_dim=256, **_TIED), 3_880_263_168,
        in_text_config=True,
    ),
    "gemma-4-31B": Published("gemma4", _GEMMA_4_31B, 30_697_345_340, stated=False, in_text_config=True),
    "gemma-4-31B, text": Published("gemma4_text", _GEMMA_4_31B, 30_697_345_340, stated=False),
    "gemma-4-E2B, text": Published("gemma4_text", _TIED, 5_077_177_886, stated=False),  # transformers' defaults
    "gemma4_unified, transformers' defaults": Published(
        "gemma4_unified", _TIED, 3_010_758_430, stated=False, in_text_config=True,
    ),
    "gemma4_unified_text, transformers' defaults": Published(
        "gemma4_unified_text", _TIED, 3_010_758_430, stated=False,
    ),
    "glm-4-9b-hf": Published(
        "glm", _sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True, **_UNTIED),
        9_399_951_360,
    ),
    "GLM-4-9B-0414": Published(
        "glm4", _sizes(151552, 4096, 13696, 40, 32, 2, head_dim=128, attention_bias=True, **_UNTIED),
        9_400_279_040,
    ),
    "GLM-4.5-Air": Published(
        "glm4_moe", _sizes(151552, 4096, 10944, 46, 96, 8, head_dim=128, attention_bias=True, use_qk_norm=False,
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408,
        first_k_dense_replace=1, n_group=1, topk_group=1, **_UNTIED), 106_852_251_264, stated=False,
    ),
    "gpt2": Published(
        "gpt2", {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}, 124_439_808,
    ),
    "gpt2-xl": Published(
        "gpt2", {"vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024},
        1_557_611_200,
    ),
    "starcoderbase-1b": Published(
        "gpt_bigcode", {"vocab_size": 49152, "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_inner": 8192,
        "n_positions": 8192, "multi_query": True}, 1_137_207_296,
    ),
    "starcoder": Published(
        "gpt_bigcode", {"vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576,
        "n_positions": 8192, "multi_query": True}, 15_517_456_384,
    ),
    "gpt-neo-125m": Published(
        "gpt_neo", {"vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12,
        "max_position_embeddings": 2048, "attention_types": [[["global", "local"], 6]]}, 125_198_592,
    ),
    "pythia-70m": Published("gpt_neox", _sizes(50304, 512, 2048, 6, 8, 8), 70_426_624),
    "pythia-410m": Published("gpt_neox", _sizes(50304, 1024, 4096, 24, 16, 16), 405_334_016),
    "granite-4.0-h-tiny": Published(
        "granitemoehybrid", _sizes(100352, 1536, 512, 40, 12, 4, layer_types=_GRANITE_4, mamba_n_heads=48,
        mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_expand=2, num_local_experts=64,
        num_experts_per_tok=6, shared_intermediate_size=1024, position_embedding_type="nope", **_TIED),
        6_939_037_248, stated=False,
    ),
    "Falcon-H1-0.5B-Base": Published(
        "falcon_h1", _sizes(32784, 1024, 2048, 36, 8, 2, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24,
        mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, **_UNTIED), 521_411_104,
    ),
    "gpt-oss-20b": Published("gpt_oss", _GPT_OSS_20B, 20_914_757_184, active=3.6),
    "gpt-oss-120b": Published(
        "gpt_oss", _GPT_OSS_20B | {"num_hidden_layers": 36, "num_local_experts": 128}, 116_829_156_672, active=5.1,
    ),
    "gpt-j-6b": Published(
        "gptj", {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
        "n_positions": 2048}, 6_050_882_784,
    ),
    "granite-3.1-2b-instruct": Published("granite", _sizes(49155, 2048, 8192, 40, 32, 8, **_TIED), 2_533_531_648),
    "granite-3.0-1b-a400m-instruct": Published(
        "granitemoe", _sizes(49155, 1024, 512, 24, 16, 8, num_local_experts=32, num_experts_per_tok=8, **_TIED),
        1_334_628_352, active=0.4,
    ),
    "granite-3.0-3b-a800m-instruct": Published(
        "granitemoe", _sizes(49155, 1536, 512, 32, 24, 8, num_local_experts=40, num_experts_per_tok=8, **_TIED),
        3_298_793_472,
    ),
    "granite-3.0-3b-a800m-instruct with a shared MLP": Published(
        "granitemoeshared", _sizes(49155, 1536, 512, 32, 24, 8, num_local_experts=40, num_experts_per_tok=8,
        shared_intermediate_size=1024, **_TIED), 3_449_788_416, stated=False,
    ),
    "Hunyuan-0.5B-Instruct": Published(
        "hunyuan_v1_dense", _sizes(120818, 1024, 3584, 24, 16, 8, head_dim=128, **_TIED), 539_010_048,
        stated=False,
    ),
    "SmolLM2-135M": Published("llama", _sizes(49152, 576, 1536, 30, 9, 3, **_TIED), 134_515_008),
    "Llama-3.2-1B": Published("llama", _sizes(128256, 2048, 8192, 16, 32, 8, head_dim=64, **_TIED), 1_235_814_400),
    "Llama-3.2-3B": Published("llama", _sizes(128256, 3072, 8192, 28, 24, 8, head_dim=128, **_TIED), 3_212_749_824),
    "Llama-3.1-8B": Published("llama", _sizes(128256, 4096, 14336, 32, 32, 8, **_UNTIED), 8_030_261_248),
    "Ministral-8B-Instruct-2410": Published(
        "ministral", _sizes(131072, 4096, 12288, 36, 32, 8, head_dim=128, **_UNTIED), 8_019_808_256,
    ),
    "Ministral-3-3B-Base-2512, text": Published("ministral3", _MINISTRAL_3_3B, 3_429_006_336, stated=False),
    "Ministral-3-3B-Base-2512": Published(
        "mistral3", _MINISTRAL_3_3B | {"model_type": "ministral3"}, 3_429_006_336, stated=False,
        in_text_config=True,
    ),
    "Mistral-7B-v0.1": Published("mistral", _sizes(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Mistral-Small-3.1-24B-Base-2503": Published(
        "mistral3", _sizes(131072, 5120, 32768, 40, 32, 8, head_dim=128, model_type="mistral", **_UNTIED),
        23_572_403_200, in_text_config=True,
    ),
    "Mixtral-8x7B-v0.1": Published(
        "mixtral", _sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704, active=12.9,
    ),
    "OLMo-1B-hf": Published("olmo", _sizes(50304, 2048, 8192, 16, 16, 16, **_TIED), 1_176_764_416),
    "OLMo-2-0425-1B": Published("olmo2", _sizes(100352, 2048, 8192, 16, 16, 16, **_UNTIED), 1_484_916_736),
    "OLMo-2-1124-7B": Published("olmo2", _sizes(100352, 4096, 11008, 32, 32, 32, **_UNTIED), 7_298_617_344),
    "Olmo-3-1025-7B": Published("olmo3", _sizes(100278, 4096, 11008, 32, 32, 32, **_UNTIED), 7_298_011_136),
    "OLMoE-1B-7B-0924": Published(
        "olmoe", _sizes(50304, 2048, 1024, 16, 16, 16, num_experts=64, num_experts_per_tok=8), 6_919_161_856,
        active=1.3,
    ),
    "opt-125m": Published(
        "opt", {"vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "word_embed_proj_dim": 768, "max_position_embeddings": 2048}, 125_239_296,
        unread=2 * 768,
    ),
    "opt-350m": Published(
        "opt", {"vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
        "max_position_embeddings": 2048}, 331_196_416, unread=2 * 1024,
    ),
    "phi-2": Published("phi", _sizes(51200, 2560, 10240, 32, 32, 32), 2_779_683_840),
    "Phi-3-mini-4k-instruct": Published("phi3", _sizes(32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    "phi-4": Published("phi3", _sizes(100352, 5120, 17920, 40, 40, 10), 14_659_507_200),
    "Qwen2.5-0.5B": Published("qwen2", _sizes(151936, 896, 4864, 24, 14, 2, **_TIED), 494_032_768),
    "Qwen1.5-MoE-A2.7B": Published(
        "qwen2_moe", _sizes(151936, 2048, 5632, 24, 16, 16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, decoder_sparse_step=1, **_UNTIED),
        14_315_784_192, active=2.7,
    ),
    "Qwen3-0.6B": Published("qwen3", _sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128, **_TIED), 596_049_920),
    "Qwen3-8B": Published("qwen3", _sizes(151936, 4096, 12288, 36, 32, 8, head_dim=128, **_UNTIED), 8_190_735_360),
    "Qwen3.5-9B": Published("qwen3_5", _QWEN35_9B, 8_953_803_264, stated=False, in_text_config=True),
    "Qwen3.5-9B, text": Published("qwen3_5_text", _QWEN35_9B, 8_953_803_264, stated=False),
    "Qwen3.5-35B-A3B": Published(
        "qwen3_5_moe", _QWEN35_35B, 34_660_610_688, stated=False, active=3.0, in_text_config=True,
    ),
    "Qwen3.5-35B-A3B, text": Published("qwen3_5_moe_text", _QWEN35_35B, 34_660_610_688, stated=False, active=3.0),
    "Qwen3-30B-A3B": Published(
        "qwen3_moe", _sizes(151936, 2048, 6144, 48, 32, 4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, **_UNTIED), 30_532_122_624, active=3.3,
    ),
    "Qwen3-Next-80B-A3B-Instruct": Published(
        "qwen3_next", _sizes(151936, 2048, 5120, 48, 16, 2, head_dim=256, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        decoder_sparse_step=1, **_UNTIED), 79_674_391_296,
    ),
    "Seed-OSS-36B-Base": Published(
        "seed_oss", _sizes(155136, 5120, 27648, 64, 80, 8, head_dim=128, attention_bias=True,
        attention_out_bias=False, **_UNTIED), 36_151_104_512,
    ),
    "SmolLM3-3B": Published("smollm3", _sizes(128256, 2048, 11008, 36, 16, 4, **_TIED), 3_075_098_624),
    "ModernBERT-base": Published("modernbert", _bert(50368, 768, 1152, 22, 12, 8192), 149_655_232, stated=False),
    "albert-base-v2": Published(
        "albert", _bert(30000, 768, 3072, 12, 12, 512, embedding_size=128), 11_221_680, unread=-11 * 7_087_872,
        stated=False,
    ),
    "bert-base-uncased": Published("bert", _bert(30522, 768, 3072, 12, 12, 512), 109_514_298, stated=False),
    "deberta-v2-xlarge": Published(
        "deberta-v2", _bert(128100, 1536, 6144, 24, 24, 512, conv_kernel_size=3, conv_act="gelu", **_DEBERTA_V3),
        887_085_156, stated=False,
    ),
    "deberta-v3-base": Published(
        "deberta-v2", _bert(128100, 768, 3072, 12, 12, 512, **_DEBERTA_V3), 184_551_780, stated=False,
    ),
    "distilbert-base-uncased": Published(
        "distilbert", {"vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12}, 66_985_530,
        stated=False,
    ),
    "electra-small": Published(
        "electra", _bert(30522, 256, 1024, 12, 4, 512, embedding_size=128), 13_546_682, stated=False,
    ),
    "roberta-large": Published(
        "roberta", _bert(50265, 1024, 4096, 24, 16, 514, type_vocab_size=1), 355_412_057, unread=2 * 1024, stated=False,
    ),
    "xlm-roberta-base": Published(
        "xlm-roberta", _bert(250002, 768, 3072, 12, 12, 514, type_vocab_size=1), 278_295_186, unread=2 * 768,
        stated=False,
    ),
    "stablelm-3b-4e1t": Published("stablelm", _sizes(50304, 2560, 6912, 32, 32, 32, **_UNTIED), 2_795_443_200),
    "stablelm-2-1_6b": Published(
        "stablelm", _sizes(100352, 2048, 5632, 24, 32, 32, use_qkv_bias=True, **_UNTIED), 1_644_515_328,
    ),
    "starcoder2-3b": Published("starcoder2", _sizes(49152, 3072, 12288, 30, 24, 2, **_TIED), 3_030_371_328),
}
# fmt: on
