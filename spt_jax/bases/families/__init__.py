"""Families of bases: one file each, registered here."""

from spt_jax.bases.families.arcee import Arcee
from spt_jax.bases.families.bart import Bart, MBart
from spt_jax.bases.families.bert import Albert, Bert, DistilBert, Electra, Roberta, XlmRoberta
from spt_jax.bases.families.bloom import Bloom
from spt_jax.bases.families.cohere import Cohere, Cohere2
from spt_jax.bases.families.deberta import DebertaV2
from spt_jax.bases.families.deepseek import DeepseekV2, DeepseekV3
from spt_jax.bases.families.exaone import Exaone4
from spt_jax.bases.families.falcon import Falcon
from spt_jax.bases.families.falcon_h1 import FalconH1
from spt_jax.bases.families.family import EncoderDecoderFamily, Family, Origin, Part
from spt_jax.bases.families.gemma import Gemma, Gemma2, Gemma3, Gemma3Text
from spt_jax.bases.families.gemma4 import Gemma4, Gemma4Text, Gemma4Unified, Gemma4UnifiedText
from spt_jax.bases.families.glm import Glm, Glm4
from spt_jax.bases.families.glm_moe import Glm4Moe
from spt_jax.bases.families.gpt2 import GPT2
from spt_jax.bases.families.gpt_bigcode import GPTBigCode
from spt_jax.bases.families.gpt_neo import GPTNeo
from spt_jax.bases.families.gpt_neox import GPTNeoX
from spt_jax.bases.families.gpt_oss import GptOss
from spt_jax.bases.families.gptj import GPTJ
from spt_jax.bases.families.granite import Granite
from spt_jax.bases.families.granite_hybrid import GraniteMoeHybrid
from spt_jax.bases.families.granite_moe import GraniteMoe, GraniteMoeShared
from spt_jax.bases.families.hunyuan import HunYuanDense
from spt_jax.bases.families.llama import Llama
from spt_jax.bases.families.mistral import Ministral, Ministral3, Mistral, Mistral3
from spt_jax.bases.families.mixtral import Mixtral
from spt_jax.bases.families.modernbert import ModernBert
from spt_jax.bases.families.olmo import Olmo, Olmo2, Olmo3
from spt_jax.bases.families.olmoe import Olmoe
from spt_jax.bases.families.opt import OPT
from spt_jax.bases.families.phi import Phi
from spt_jax.bases.families.phi3 import Phi3
from spt_jax.bases.families.qwen import Qwen2, Qwen3
from spt_jax.bases.families.qwen3_5 import Qwen35, Qwen35Moe, Qwen35MoeText, Qwen35Text
from spt_jax.bases.families.qwen3_next import Qwen3Next
from spt_jax.bases.families.qwen_moe import Qwen2Moe, Qwen3Moe
from spt_jax.bases.families.seed_oss import SeedOss
from spt_jax.bases.families.smollm import SmolLM3
from spt_jax.bases.families.stablelm import StableLm
from spt_jax.bases.families.starcoder2 import Starcoder2
from spt_jax.bases.families.t5 import MT5, T5, UMT5
from spt_jax.bases.families.t5gemma import T5Gemma, T5Gemma2
from spt_jax.errors import ConfigError

__all__ = ["ENCODER_DECODERS", "FAMILIES", "EncoderDecoderFamily", "Family", "Origin", "Part", "family_of"]

_REGISTERED: tuple[Family, ...] = (
    Albert(),
    Arcee(),
    Bert(),
    Bloom(),
    Cohere(),
    Cohere2(),
    DebertaV2(),
    DeepseekV2(),
    DeepseekV3(),
    DistilBert(),
    Electra(),
    Exaone4(),
    Falcon(),
    FalconH1(),
    Gemma(),
    Gemma2(),
    Gemma3(),
    Gemma3Text(),
    Gemma4(),
    Gemma4Text(),
    Gemma4Unified(),
    Gemma4UnifiedText(),
    Glm(),
    Glm4(),
    Glm4Moe(),
    GPT2(),
    GPTBigCode(),
    GPTJ(),
    GPTNeo(),
    GPTNeoX(),
    GptOss(),
    Granite(),
    GraniteMoe(),
    GraniteMoeHybrid(),
    GraniteMoeShared(),
    HunYuanDense(),
    Llama(),
    Ministral(),
    Ministral3(),
    Mistral(),
    Mistral3(),
    Mixtral(),
    ModernBert(),
    Olmo(),
    Olmo2(),
    Olmo3(),
    Olmoe(),
    OPT(),
    Phi(),
    Phi3(),
    Qwen2(),
    Qwen2Moe(),
    Qwen3(),
    Qwen35(),
    Qwen35Moe(),
    Qwen35MoeText(),
    Qwen35Text(),
    Qwen3Moe(),
    Qwen3Next(),
    Roberta(),
    SeedOss(),
    SmolLM3(),
    StableLm(),
    Starcoder2(),
    XlmRoberta(),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _REGISTERED}
# Those with an encoder and a decoder.
_BOTH_SIDES: tuple[EncoderDecoderFamily, ...] = (Bart(), MBart(), MT5(), T5(), T5Gemma(), T5Gemma2(), UMT5())
ENCODER_DECODERS: dict[str, EncoderDecoderFamily] = {family.model_type: family for family in _BOTH_SIDES}


def family_of(model_type: str) -> Family | EncoderDecoderFamily:
    """The family of a `model_type` in `config.json`.

    Args:
      model_type: the type.

    Returns:
      The family.

    Raises:
      ConfigError: there is none.
    """
    families = {**FAMILIES, **ENCODER_DECODERS}
    if model_type not in families:
        raise ConfigError(f"architecture {model_type!r:.60} is not supported; supported are {', '.join(families)}")
    return families[model_type]
