"""DeBERTa-v2 and DeBERTa-v3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.bert import Bert
from spt_jax.bases.families.encoder import linear_maps
from spt_jax.bases.families.family import Origin
from spt_jax.bases.families.gpt import norms
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.disentangled_config import DisentangledConfig

# The head by its name in the files of its authors, and in those of transformers.
_HEAD = {
    "lm_predictions.lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_predictions.lm_head.LayerNorm.": "cls.predictions.transform.LayerNorm.",
    "lm_predictions.lm_head.bias": "cls.predictions.bias",
}
# The head that DeBERTa-v3 is pretrained with tells real tokens from replaced ones.
_OTHER_HEAD = "mask_predictions."


class DebertaV2(Bert):
    """DeBERTa-v2 and -v3 (He et al. 2021, arXiv 2006.03654 and 2111.09543): scores depend on embedded distances."""

    model_type: ClassVar[str] = "deberta-v2"
    architecture: ClassVar[str] = "DebertaV2ForMaskedLM"
    prefix: ClassVar[str] = "deberta."
    modules: ClassVar[Any] = dataclasses.replace(
        Bert.modules,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    )

    def changes(self, hf: Any) -> Mapping[str, Any]:
        if getattr(hf, "conv_kernel_size", 0) > 0:
            raise ConfigError(f"{hf.model_type} with conv_kernel_size {hf.conv_kernel_size} is not supported")
        if getattr(hf, "embedding_size", hf.hidden_size) != hf.hidden_size:
            raise ConfigError(f"{hf.model_type} with an embedding_size other than hidden_size is not supported")
        if getattr(hf, "attention_head_size", hf.hidden_size // hf.num_attention_heads) * hf.num_attention_heads != (
            hf.hidden_size
        ):
            raise ConfigError(f"{hf.model_type} with attention_head_size {hf.attention_head_size} is not supported")
        terms = tuple(hf.pos_att_type or ())
        if set(terms) - {"c2p", "p2c"}:
            raise ConfigError(f"{hf.model_type} with pos_att_type {'|'.join(terms)!r} is not supported")
        head_size = hf.hidden_size // hf.num_attention_heads
        return {
            "positions": "learned" if hf.position_biased_input else "none",
            "score_scale": (head_size * (1 + len(set(terms)))) ** -0.5,
            "disentangled": _disentangled(hf, terms) if hf.relative_attention else None,
        }

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        found = dict(super().origins(config))
        if not config.learned_positions:
            del found["positions"]
        own = config.disentangled
        if own is None:
            return found
        encoder = f"{self.prefix}encoder."
        found["distances"] = Origin(encoder + "rel_embeddings.weight")
        if own.normed:
            found |= norms(config, [("distance_norm", encoder + "LayerNorm")])
        if not own.shared:
            layer = f"{self.prefix}{self.layer}attention.self."
            terms = [(own.content_to_position, "key"), (own.position_to_content, "query")]
            found |= linear_maps(
                (f"layers/attention/distance_{name}", f"{layer}pos_{name}_proj") for has, name in terms if has
            )
        return found

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        if name.startswith(_OTHER_HEAD):
            return None
        if not config.learned_positions and name.endswith("embeddings.position_embeddings.weight"):
            return None
        for theirs, ours in _HEAD.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        return super().canonical(name, config)

    def tiny(self) -> Mapping[str, Any]:
        # Distances beyond 4 share embeddings, and those beyond 30 have the last one.
        return {
            **super().tiny(),
            "relative_attention": True,
            "max_relative_positions": 32,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        }


def _disentangled(hf: Any, terms: tuple[str, ...]) -> DisentangledConfig:
    norm = getattr(hf, "norm_rel_ebd", "none").strip().lower()
    if norm not in ("none", "layer_norm"):
        raise ConfigError(f"{hf.model_type} with norm_rel_ebd {norm!r} is not supported")
    farthest = getattr(hf, "max_relative_positions", -1)
    farthest = hf.max_position_embeddings if farthest < 1 else farthest
    buckets = getattr(hf, "position_buckets", -1)
    return DisentangledConfig(
        span=buckets if buckets > 0 else farthest,
        max_distance=farthest,
        logarithmic=buckets > 0,
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        shared=bool(getattr(hf, "share_att_key", False)),
        normed=norm == "layer_norm",
    )
