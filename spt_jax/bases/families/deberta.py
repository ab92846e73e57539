"""DeBERTa-v2 and DeBERTa-v3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.bert import Bert
from spt_jax.bases.families.encoder import linear_maps
from spt_jax.bases.families.family import Origin, Part, activation
from spt_jax.bases.families.gpt import norms
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.convolution_config import ConvolutionConfig
from spt_jax.models.disentangled_config import DisentangledConfig
from spt_jax.models.variant import Variant

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
            "variants": _convolved(hf) if getattr(hf, "conv_kernel_size", 0) > 0 else (),
        }

    def layer_origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        found, own = dict(super().layer_origins(config)), config.disentangled
        if own is not None and not own.shared:
            layer = f"{self.prefix}{self.layer}attention.self."
            terms = [(own.content_to_position, "key"), (own.position_to_content, "query")]
            maps = [(f"attention/distance_{name}", f"{layer}pos_{name}_proj") for has, name in terms if has]
            found |= linear_maps(maps)
        if config.convolution is not None:
            module, size, shape = f"{self.prefix}encoder.conv.", config.convolution.size, (config.width, config.width)
            for tap in range(size):
                part = Part(2, tap, tap + 1)
                found[f"convolution/tap_{tap}/kernel"] = Origin(
                    module + "conv.weight", transpose=True, take=part, shape=(*shape, size)
                )
            found["convolution/bias"] = Origin(module + "conv.bias")
            found |= norms(config, [("convolution_norm", module + "LayerNorm")])
        return found

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        found = dict(super().origins(config))
        if not config.learned_positions:
            del found["positions"]
        if config.disentangled is not None:
            encoder = f"{self.prefix}encoder."
            found["distances"] = Origin(encoder + "rel_embeddings.weight")
            if config.disentangled.normed:
                found |= norms(config, [("distance_norm", encoder + "LayerNorm")])
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


def _convolved(hf: Any) -> tuple[Variant, ...]:
    """The first layer, to whose output a convolution is added."""
    groups, name = getattr(hf, "conv_groups", 1), getattr(hf, "conv_act", "tanh")
    if groups != 1:
        raise ConfigError(f"{hf.model_type} with conv_groups {groups} is not supported")
    convolution = ConvolutionConfig(size=hf.conv_kernel_size, activation="tanh" if name == "tanh" else activation(name))
    return (Variant(name="convolved", layers=(0,), convolution=convolution),)
