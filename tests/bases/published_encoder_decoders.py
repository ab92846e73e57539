"""Fields of published `config.json` files of encoder-decoders, and how many parameters the models have.

tests/parity compares the numbers with those of transformers' models.
"""

from typing import Any

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import hf_config, model_config
from spt_jax.bases.families import ENCODER_DECODERS
from spt_jax.models.model import Params


def _t5(vocabulary: int, width: int, head: int, mlp: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": head, "d_ff": mlp, "num_heads": heads, **others}
    return {"num_layers": layers, "num_decoder_layers": layers, **sizes}


def _bart(vocabulary: int, width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    both = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    return {"vocab_size": vocabulary, "d_model": width, "max_position_embeddings": 1024, **sides, **others}


_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_OLD_MBART = {
    "normalize_before": True,
    "add_final_layer_norm": True,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": 2,
    "scale_embedding": True,
}

_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}

_GEMMA_3 = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
}

# Model type, fields, the number of parameters with tied matrices counted once, and how many of them no token uses: the
# first two rows of the positions of each side.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "t5-small": ("t5", _t5(32128, 512, 64, 2048, 6, 8), 60_506_624, 0),
    "flan-t5-base": ("t5", _t5(32128, 768, 64, 2048, 12, 12, **_GATED), 247_577_856, 0),
    "mt5-small": ("mt5", _t5(250112, 512, 64, 1024, 8, 6, **_GATED), 300_176_768, 0),
    "umt5-small": ("umt5", _t5(256384, 512, 64, 1024, 8, 6, **_GATED), 306_601_984, 0),
    "bart-base": ("bart", _bart(50265, 768, 6, 12, normalize_before=False), 139_470_681, 4 * 768),
    "bart-large-cnn": ("bart", _bart(50264, 1024, 12, 16, forced_bos_token_id=0), 406_340_696, 4 * 1024),
    "t5gemma-2b-2b-ul2": ("t5gemma", {"encoder": _GEMMA, "decoder": _GEMMA}, 5_596_853_760, 0),
    "t5gemma-2-270m-270m": (
        "t5gemma2",
        {
            "encoder": {"text_config": _GEMMA_3, "vision_config": {"model_type": "siglip_vision_model"}},
            "decoder": _GEMMA_3,
        },
        368_424_832,
        0,
    ),
    "mbart-large-50": ("mbart", _bart(250054, 1024, 12, 16, decoder_start_token_id=2, **_OLD_MBART), 611_129_542, 4096),
}


def shapes_of(name: str) -> Params:
    """The parameters of a released model, with the output matrix and the bias that its files hold."""
    family, fields, _, _ = PUBLISHED[name]
    config = model_config(hf_config({"model_type": family, **fields}))
    assert not hasattr(config, "causal")
    names = {"final_logits_bias", *(["lm_head.weight"] if fields.get("tie_word_embeddings") is False else [])}
    return parameter_shapes(ENCODER_DECODERS[family].stored(config, names))
