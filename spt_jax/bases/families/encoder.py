"""What encoders share: heads that predict masked tokens, and tensors of heads that are left out."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, with_prefix
from spt_jax.bases.families.gpt import norms
from spt_jax.models.config import DecoderConfig

# Heads of other tasks, and copies of position ids, which older libraries stored beside the weights.
_UNUSED = re.compile(
    r"^(.*\.)?(pooler|position_ids|token_type_ids)(\.|$)"
    r"|^(cls\.seq_relationship|sop_classifier|classifier|pre_classifier|qa_outputs|discriminator_predictions)\."
)
# Names of the parameters of norms in files of the first BERT models.
_RENAMED = {"gamma": "weight", "beta": "bias"}


def output_head(hf: Any) -> Literal["masked", "none"]:
    """Whether the files hold a head that predicts masked tokens, by the `architectures` in config.json.

    Args:
      hf: a transformers config. If it does not tell, the head is expected.
    """
    # The head that ELECTRA's discriminator is pretrained with tells real tokens from replaced ones.
    ends = ("ForMaskedLM",) if hf.model_type == "electra" else ("ForMaskedLM", "ForPreTraining")
    return "masked" if any(name.endswith(ends) for name in hf.architectures or ends) else "none"


class EncoderLike:
    """Base class of families of encoders. A class names its tensors in these attributes.

    Attributes:
      prefix: what the names of all tensors but those of heads start with; files saved without a head lack it.
      head: name of the linear map and of the norm of the head that predicts masked tokens, and of its bias.
      decoder: name of the output matrix, which a tied model may store a second time.
    """

    prefix: ClassVar[str]
    head: ClassVar[tuple[str, str, str]]
    decoder: ClassVar[str]

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None for heads of other tasks."""
        if _UNUSED.search(name) or name == f"{self.decoder}.bias" != self.head[2]:
            return None
        front, _, end = name.rpartition(".")
        if front.endswith("LayerNorm"):
            name = f"{front}.{_RENAMED.get(end, end)}"
        if name == f"{self.decoder}.weight" and config.tied:
            name = OUTPUT_KEY
        of_head = (*(f"{part}." for part in self.head[:2]), f"{self.decoder}.", self.head[2], OUTPUT_KEY)
        if name.startswith(of_head):
            return name if config.output_head == "masked" else None
        return with_prefix(name, self.prefix)

    def head_origins(self, config: DecoderConfig) -> Mapping[str, Origin]:
        """Returns where the head that predicts masked tokens is stored, if there is one.

        Args:
          config: of the model.
        """
        if config.output_head == "none":
            return {}
        linear, norm, bias = self.head
        found = {"head_map/kernel": Origin(f"{linear}.weight", transpose=True), **norms(config, [("head_norm", norm)])}
        if config.mlp_bias:
            found["head_map/bias"] = Origin(f"{linear}.bias")
        if config.logit_bias:
            found["logit_bias"] = Origin(bias)
        if not config.tied:
            found["output"] = Origin(f"{self.decoder}.weight", transpose=True)
        return found


def linear_maps(table: Iterable[tuple[str, str]], layers: tuple[int, ...] | None = None) -> dict[str, Origin]:
    """Returns the origins of linear maps with biases.

    Args:
      table: path of the map and name of its module.
      layers: the layers that share one tensor; None if each has its own.
    """
    found = {}
    for ours, theirs in table:
        found[f"{ours}/kernel"] = Origin(f"{theirs}.weight", transpose=True, layers=layers)
        found[f"{ours}/bias"] = Origin(f"{theirs}.bias", layers=layers)
    return found
