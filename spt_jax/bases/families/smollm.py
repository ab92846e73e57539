"""SmolLM3: Llama with layers that do not rotate."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, llama_config, windows
from spt_jax.models.config import DecoderConfig


class SmolLM3(LlamaLike):
    """SmolLM3 3B: no RoPE in every fourth layer."""

    model_type: ClassVar[str] = "smollm3"
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        bias = bool(hf.attention_bias)
        return llama_config(
            hf,
            max_length,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bool(hf.mlp_bias),
            # The config's list has 1 for each layer that rotates.
            no_rope_layers=tuple(i for i in range(hf.num_hidden_layers) if not hf.no_rope_layers[i]),
            **windows(hf),
        )

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}
