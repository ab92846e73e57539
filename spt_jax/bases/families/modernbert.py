"""ModernBERT."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.encoder import EncoderLike, output_head
from spt_jax.bases.families.family import Origin, activation, by_stack, joined_projection, projections
from spt_jax.bases.families.gpt import gpt_config, norms
from spt_jax.bases.families.llama import ropes_by_type, windows
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.variant import Variant


class ModernBert(EncoderLike):
    """ModernBERT (Warner et al. 2024, arXiv 2412.13663): RoPE, gated MLPs, and windows on both sides of a token."""

    model_type: ClassVar[str] = "modernbert"
    architecture: ClassVar[str] = "ModernBertForMaskedLM"
    prefix: ClassVar[str] = "model."
    head: ClassVar[tuple[str, str, str]] = ("head.dense", "head.norm", "decoder.bias")
    decoder: ClassVar[str] = "decoder"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        head = output_head(hf)
        if head == "masked" and (hf.classifier_bias != hf.mlp_bias or hf.classifier_activation != hf.hidden_activation):
            raise ConfigError("modernbert needs the bias and the activation of its head to be those of its layers")
        # A token sees itself and half a window on either side.
        fields = windows(hf)
        fields |= {"window": fields["window"] + 1} if fields else {}
        return gpt_config(
            hf,
            causal=False,
            pooling={"cls": "first", "mean": "mean"}[hf.classifier_pooling],
            output_head=head,
            logit_bias=head == "masked" and bool(hf.decoder_bias),
            mlp_width=hf.intermediate_size,
            gated_mlp=True,
            activation=activation(hf.hidden_activation),
            norm_epsilon=hf.norm_eps,
            norm_bias=bool(hf.norm_bias),
            embedding_norm=True,
            qkv_bias=bool(hf.attention_bias),
            output_bias=bool(hf.attention_bias),
            mlp_bias=bool(hf.mlp_bias),
            variants=(Variant(name="first", layers=(0,), attention_norm=False),),
            **fields,
            **ropes_by_type(hf, max_length),
        )

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        layer = self.prefix + "layers.{i}."

        def of_layer(own: DecoderConfig) -> Mapping[str, Origin]:
            size, width = own.heads * own.head_size, own.mlp_width
            attention = [(f"attention/{name}", size) for name in ("query", "key", "value")]
            normed = [("mlp_norm", layer + "mlp_norm")]
            if own.attention_norm:
                normed.append(("attention_norm", layer + "attn_norm"))
            linear = [("attention/output", "attn.Wo", own.output_bias), ("mlp/down", "mlp.Wo", own.mlp_bias)]
            return {
                **joined_projection(attention, layer + "attn.Wqkv", own.qkv_bias),
                **joined_projection([("mlp/gate", width), ("mlp/up", width)], layer + "mlp.Wi", own.mlp_bias),
                **projections(linear, layer),
                **norms(own, normed),
            }

        outer = [("embedding_norm", self.prefix + "embeddings.norm"), ("final_norm", self.prefix + "final_norm")]
        return {
            "embedding": Origin(self.prefix + "embeddings.tok_embeddings.weight"),
            **norms(config, outer),
            **by_stack(config, of_layer),
            **self.head_origins(config),
        }

    def tiny(self) -> Mapping[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": 2,
        }
