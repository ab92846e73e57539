"""The language model inside a model that also reads images or sound."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from spt_jax.bases.families.family import OUTPUT_KEY, Origin, SeveralTables
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


class TextFamily(Protocol):
    """A family whose tensors are named `model.*` if the language model is stored without the rest."""

    model_type: ClassVar[str]

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig: ...

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]: ...

    def tiny(self) -> Mapping[str, Any]: ...


_OTHER_PARTS = "vision_tower|multi_modal_projector|embed_vision|visual|audio_tower|embed_audio|vision_embedder"
# A vision model of about 5,000 parameters, for the fields that transformers' vision configs share.
TINY_VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


class TextPart:
    """Base class of families whose config has the language model's in `text_config`.

    Files have the names `language_model.model.*`, as on the hub, or `model.language_model.*`, as transformers names the
    modules. The tensors of the models of images and sound, and of their projections, are left out.

    Attributes:
      texts: families of the language model, which have the same tensors.
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str] = "language_model.model."
    texts: ClassVar[tuple[TextFamily, ...]]

    def config(self, hf: Any, max_length: int | None) -> DecoderConfig:
        text = hf.text_config
        families = {family.model_type: family for family in self.texts}
        if text.model_type not in families:
            raise ConfigError(
                f"{self.model_type} with a language model of type {text.model_type!r:.60} is not supported; supported"
                f" are {', '.join(families)}"
            )
        # transformers 4 reads the one of `text_config`, transformers 5 the outer one, whose default is true.
        tied = bool(hf.tie_word_embeddings and text.tie_word_embeddings)
        inner = families[text.model_type].config(text, max_length)
        return dataclasses.replace(inner, family=self.model_type, tied=tied)

    def origins(self, config: DecoderConfig) -> Mapping[str, Origin | tuple[Origin, ...]]:
        return self._renamed(self.texts[0].origins(config))

    def alternatives(self, config: DecoderConfig) -> tuple[Mapping[str, Origin | tuple[Origin, ...]], ...]:
        """Returns other tables, if the family of the language model has some."""
        text = self.texts[0]
        return tuple(map(self._renamed, text.alternatives(config))) if isinstance(text, SeveralTables) else ()

    def _renamed(self, table: Mapping[str, Origin | tuple[Origin, ...]]) -> Mapping[str, Origin | tuple[Origin, ...]]:
        def renamed(origin: Origin) -> Origin:
            return dataclasses.replace(origin, key=re.sub(r"^model\.", self.prefix, origin.key))

        return {
            path: tuple(map(renamed, found)) if isinstance(found, tuple) else renamed(found)
            for path, found in table.items()
        }

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the name in the table of a stored tensor; None if it is not of the language model."""
        if re.match(rf"(model\.)?({_OTHER_PARTS})\.", name):
            return None
        if re.fullmatch(r"(language_model\.)?lm_head\.weight", name):
            return OUTPUT_KEY
        return re.sub(r"^(model\.language_model\.|language_model\.(model\.)?)", self.prefix, name)

    def tiny(self) -> Mapping[str, Any]:
        text = self.texts[-1]
        return {
            "text_config": {**text.tiny(), "model_type": text.model_type},
            "vision_config": TINY_VISION,
            "tie_word_embeddings": text.tiny()["tie_word_embeddings"],
        }
