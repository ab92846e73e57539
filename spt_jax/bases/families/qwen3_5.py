"""Qwen 3.5, alone and as the text part of a model that reads images; dense and with experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, joined_projection, projections
from spt_jax.bases.families.qwen3_next import (
    LAYER,
    TINY_EXPERTS,
    TINY_HYBRID,
    HybridQwen,
    experts_config,
    experts_together,
    hybrid_config,
)
from spt_jax.bases.families.text_part import TextFamily, TextPart
from spt_jax.models.config import DecoderConfig
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.experts_config import ExpertsConfig

# M-RoPE gives a token of text the same position in all sections, so that it is plain RoPE.
_ROPE = {**TINY_HYBRID["rope_parameters"], "mrope_section": [1, 1, 0], "mrope_interleaved": True}
_TINY = {**TINY_HYBRID, "intermediate_size": 32, "rope_parameters": _ROPE}
# The tensors of the model of images, and of the head that predicts several tokens at once.
_LEFT_OUT = ("model.visual.", "visual.", "mtp.")


class Qwen35Text(HybridQwen):
    """Qwen 3.5: three recurrent layers (Gated DeltaNet, arXiv 2412.06464) for each layer with attention."""

    model_type: ClassVar[str] = "qwen3_5_text"
    architecture: ClassVar[str] = "Qwen3_5ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        return hybrid_config(hf, max_length)

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None if it is not of the language model."""
        if name.startswith(_LEFT_OUT):
            return None
        name = name.replace("model.language_model.", "model.", 1)
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    def delta_net_maps(self, width: int, sizes: DeltaNetConfig) -> dict[str, Origin]:
        parts = [("query", sizes.key_width), ("key", sizes.key_width), ("value", sizes.value_width)]
        others = [("gate", "in_proj_z", False), ("beta", "in_proj_b", False), ("decay", "in_proj_a", False)]
        module = f"{LAYER}linear_attn."
        return joined_projection(parts, f"{module}in_proj_qkv", False) | projections(others, module)

    def tiny(self) -> Mapping[str, Any]:
        return _TINY


class Qwen35MoeText(Qwen35Text):
    """Qwen 3.5 and 3.6 with a mixture of experts in each layer.

    Files on the hub hold the experts of a layer together, those that transformers saves each by itself.
    """

    model_type: ClassVar[str] = "qwen3_5_moe_text"
    architecture: ClassVar[str] = "Qwen3_5MoeForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        experts = experts_config(hf, renormalize=True)
        return hybrid_config(hf, max_length, experts=experts, mlp_width=experts.expert_width)

    def experts_origins(self, experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
        return super().experts_origins(experts, layer) | experts_together(experts)

    def alternatives(self, config: DecoderConfig) -> tuple[Mapping[str, Origin | tuple[Origin, ...]], ...]:
        """Returns the table of files in which each expert has tensors of its own."""
        return (_ExpertsApart().origins(config),)

    def tiny(self) -> Mapping[str, Any]:
        return {name: value for name, value in {**_TINY, **TINY_EXPERTS}.items() if name != "intermediate_size"}


class _ExpertsApart(Qwen35Text):
    pass


class Qwen35(TextPart):
    """The language model of Qwen 3.5."""

    model_type: ClassVar[str] = "qwen3_5"
    architecture: ClassVar[str] = "Qwen3_5ForConditionalGeneration"
    prefix: ClassVar[str] = "model.language_model."
    texts: ClassVar[tuple[TextFamily, ...]] = (Qwen35Text(),)

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        # `text_config` has the default, false, where only the outer field is written.
        return dataclasses.replace(super().config(hf, max_length), tied=bool(hf.tie_word_embeddings))

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        return None if name.startswith(_LEFT_OUT) else super().canonical(name, config)

    def tiny(self) -> Mapping[str, Any]:
        width = self.texts[-1].tiny()["hidden_size"]
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        vision |= {"out_hidden_size": width, "num_position_embeddings": 16}
        return {**super().tiny(), "vision_config": vision}


class Qwen35Moe(Qwen35):
    """The language model of Qwen 3.5 and 3.6 with experts."""

    model_type: ClassVar[str] = "qwen3_5_moe"
    architecture: ClassVar[str] = "Qwen3_5MoeForConditionalGeneration"
    texts: ClassVar[tuple[TextFamily, ...]] = (Qwen35MoeText(),)
