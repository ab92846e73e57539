"""Families of bases: one file each, registered here."""

from spt_jax.bases.families.bloom import Bloom
from spt_jax.bases.families.falcon import Falcon
from spt_jax.bases.families.family import Family, Origin, Part
from spt_jax.bases.families.gemma import Gemma2
from spt_jax.bases.families.glm_moe import Glm4Moe
from spt_jax.bases.families.gpt2 import GPT2
from spt_jax.bases.families.gpt_bigcode import GPTBigCode
from spt_jax.bases.families.gpt_neo import GPTNeo
from spt_jax.bases.families.gpt_neox import GPTNeoX
from spt_jax.bases.families.gpt_oss import GptOss
from spt_jax.bases.families.gptj import GPTJ
from spt_jax.bases.families.granite_moe import GraniteMoe, GraniteMoeShared
from spt_jax.bases.families.llama import Llama
from spt_jax.bases.families.mistral import Mistral
from spt_jax.bases.families.mixtral import Mixtral
from spt_jax.bases.families.olmoe import Olmoe
from spt_jax.bases.families.opt import OPT
from spt_jax.bases.families.phi import Phi
from spt_jax.bases.families.qwen import Qwen2, Qwen3
from spt_jax.bases.families.qwen_moe import Qwen2Moe, Qwen3Moe
from spt_jax.bases.families.smollm import SmolLM3
from spt_jax.bases.families.stablelm import StableLm
from spt_jax.bases.families.starcoder2 import Starcoder2
from spt_jax.errors import ConfigError

__all__ = ["FAMILIES", "Family", "Origin", "Part", "family_of"]

_REGISTERED: tuple[Family, ...] = (
    *(Gemma2(), GPT2(), Llama(), Mistral(), Qwen2(), Qwen3(), SmolLM3()),
    *(Bloom(), Falcon(), GPTBigCode(), GPTJ(), GPTNeo(), GPTNeoX(), OPT(), Phi(), StableLm(), Starcoder2()),
    # With experts:
    *(Glm4Moe(), GptOss(), GraniteMoe(), GraniteMoeShared(), Mixtral(), Olmoe(), Qwen2Moe(), Qwen3Moe()),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _REGISTERED}


def family_of(model_type: str) -> Family:
    """The family of a `model_type` in `config.json`.

    Raises:
      ConfigError: there is none.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"architecture {model_type!r:.60} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
