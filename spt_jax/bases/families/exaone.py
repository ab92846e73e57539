"""EXAONE 4."""

from collections.abc import Mapping
from typing import Any, ClassVar

from spt_jax.bases.families.llama import TINY, LlamaLike, layers_of_type, llama_config, windows
from spt_jax.models.config import DecoderConfig


class Exaone4(LlamaLike):
    """EXAONE 4 (arXiv 2507.11407): norms of outputs, queries and keys; beside a window, full layers have no RoPE."""

    model_type: ClassVar[str] = "exaone4"
    architecture: ClassVar[str] = "Exaone4ForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        no_rope = () if hf.sliding_window is None else layers_of_type(hf, "full_attention")
        return llama_config(hf, max_length, norm_place="after", qk_norm="head", no_rope_layers=no_rope, **windows(hf))

    def tiny(self) -> Mapping[str, Any]:
        return {**TINY, "num_hidden_layers": 4, "sliding_window": 7}
