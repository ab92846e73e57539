"""Deep prompts with a task head: P-tuning v2 (Liu et al. 2022, arXiv 2110.07602)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.models.model import Model
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.task_head import HeadMethod
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepPrompts(HeadMethod, PrefixTuning):
    """Keys and values of every layer, and a task head.

    Attributes:
      name: the method.
      head: the head, as in `HeadMethod`; default classification.
    """

    name: Literal["deep_prompts"] = "deep_prompts"  # type: ignore[assignment]
    head: str = "classification"

    def __post_init__(self) -> None:
        PrefixTuning.__post_init__(self)
        HeadMethod.__post_init__(self)

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns keys and values as in prefix tuning, and the head.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        return {**super().init_params(key, base), **self.init_head(base)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns keys, values and the head."""
        return self.with_head(super().materialize(params, model), params)
