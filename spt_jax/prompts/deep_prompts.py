"""Deep prompts with a task head: P-tuning v2 (Liu et al. 2022, arXiv 2110.07602)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import Params
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.virtual import Head, VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepPrompts(PrefixTuning):
    """The hyper-parameters of deep prompts: those of prefix tuning, and the head.

    Attributes:
      name: the method.
      head: classification reads a class off the last token with a linear map, trained beside the prompt and saved with
        it; language_model has no head of its own.
      classes: of the head; default the verbalizers' number.
    """

    name: Literal["deep_prompts"] = "deep_prompts"  # type: ignore[assignment]
    head: Literal["classification", "language_model"] = "classification"
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and self.classes < 2:
            raise ConfigError(f"method.classes is {self.classes}; a head tells at least 2 apart")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Keys and values as in prefix tuning, and a head [D, C] of zeros, for which all classes are alike."""
        params = super().init_params(key, base)
        if self.head == "language_model":
            return params
        if self.classes is None:
            raise ConfigError("method.classes is not set, and there are no verbalizers to count")
        head = {"kernel": jnp.zeros((base.config.width, self.classes)), "bias": jnp.zeros(self.classes)}
        return {**params, "head": head}

    def materialize(self, module: Decoder, frozen: Params, params: Mapping[str, Any]) -> VirtualPrompt:
        """Keys and values, and the head as it is."""
        virtual = super().materialize(module, frozen, params)
        return dataclasses.replace(virtual, head=Head(**params["head"])) if "head" in params else virtual

    def virtual_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Keys, values and the head."""
        shapes = super().virtual_shapes(base)
        if self.head == "classification":
            shapes |= {"head/kernel": (base["width"], self.classes or 0), "head/bias": (self.classes or 0,)}
        return shapes
