"""Deep prompts with a task head: P-tuning v2 (Liu et al. 2022, arXiv 2110.07602)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.checkpoint import Params
from spt_jax.data.templates import HeadKind
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.virtual import Head, VirtualPrompt

HEAD_UNIT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepPrompts(PrefixTuning):
    """The hyper-parameters of deep prompts: those of prefix tuning, and the head.

    Attributes:
      name: the method.
      head: a linear map trained beside the prompt and saved with it: classification reads a class off the last token,
        tagging off every word of the field `data.reads`, span the start and the end of an answer in that field;
        language_model has no head of its own.
      classes: of a classification or tagging head; default the verbalizers' number, or that of the data's tags.
      head_bias: the map has a bias.
    """

    name: Literal["deep_prompts"] = "deep_prompts"  # type: ignore[assignment]
    head: HeadKind = "classification"
    classes: int | None = None
    head_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and self.classes < 2:
            raise ConfigError(f"method.classes is {self.classes}; a head tells at least 2 apart")
        if self.classes is not None and self.head in ("span", "language_model"):
            raise ConfigError(f"method.classes={self.classes} does not go with method.head={self.head}")

    @property
    def outputs(self) -> int | None:
        """Of the head: the classes, or the start and the end of a span."""
        return 2 if self.head == "span" else self.classes

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Keys and values as in prefix tuning, and a head [D, C] of zeros, for which all classes are alike.

        The kernel is in units of 32 / D, so that a step of one learning rate moves its results alike for every width.
        """
        params = super().init_params(key, base)
        if self.head == "language_model":
            return params
        if self.outputs is None:
            raise ConfigError("method.classes is not set, and there are no verbalizers to count")
        head = {"kernel": jnp.zeros((base.config.width, self.outputs))}
        return {**params, "head": {**head, "bias": jnp.zeros(self.outputs)} if self.head_bias else head}

    def materialize(self, module: Decoder, frozen: Params, params: Mapping[str, Any]) -> VirtualPrompt:
        """Keys and values, and the head as it is."""
        virtual = super().materialize(module, frozen, params)
        if "head" not in params:
            return virtual
        kernel = params["head"]["kernel"] * (HEAD_UNIT / params["head"]["kernel"].shape[0])
        return dataclasses.replace(virtual, head=Head(kernel, params["head"].get("bias", jnp.zeros(kernel.shape[1]))))

    def virtual_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Keys, values and the head."""
        shapes = super().virtual_shapes(base)
        if self.head != "language_model":
            shapes |= {"head/kernel": (base["width"], self.outputs or 0), "head/bias": (self.outputs or 0,)}
        return shapes
