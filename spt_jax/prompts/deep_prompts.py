"""Deep prompts with a task head: P-tuning v2 (Liu et al. 2022, arXiv 2110.07602)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.data.task import TASKS, Task
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.prefix_tuning import PrefixTuning
from spt_jax.prompts.virtual import Head, VirtualPrompt, shape

HEAD_UNIT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepPrompts(PrefixTuning):
    """Keys and values of every layer, and a task head.

    Attributes:
      name: the method.
      head: a linear map that is trained and saved with the prompt. classification predicts a class from the last token,
        tagging one for every word of the field `data.reads`, span the start and the end of an answer in that field.
        language_model uses the output matrix of the frozen base instead.
      classes: number of classes of a classification or tagging head; default the number of verbalizers, or of tags in
        the data.
      head_bias: whether the head has a bias.
    """

    name: Literal["deep_prompts"] = "deep_prompts"  # type: ignore[assignment]
    head: str = "classification"
    classes: int | None = None
    head_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in TASKS:
            raise ConfigError(f"method.head is {self.head!r}; {did_you_mean(self.head, TASKS)}")
        if self.classes is not None and self.classes < 2:
            raise ConfigError(f"method.classes is {self.classes}; a head needs at least 2 classes")
        if self.classes is not None and (not self.task.has_head or self.task.outputs is not None):
            raise ConfigError(f"method.classes={self.classes} is not compatible with method.head={self.head}")

    @property
    def task(self) -> Task:
        """The task of the head."""
        return TASKS[self.head]

    @property
    def outputs(self) -> int | None:
        """Number of outputs of the head: the classes, or the number that the task fixes."""
        return self.task.outputs or self.classes

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns keys and values as in prefix tuning, and a head [D, C] of zeros: all classes are equally likely.

        The kernel is in units of 32 / D, so that one learning rate changes the logits equally for every width.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        params = super().init_params(key, base)
        if not self.task.has_head:
            return params
        if self.outputs is None:
            raise ConfigError("method.classes is not set, and there are no verbalizers to count")
        head = {"kernel": jnp.zeros((base.layout.head_width, self.outputs))}
        return {**params, "head": {**head, "bias": jnp.zeros(self.outputs)} if self.head_bias else head}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns keys, values and the head."""
        virtual = super().materialize(params, model)
        if "head" not in params:
            return virtual
        kernel = params["head"]["kernel"] * (HEAD_UNIT / params["head"]["kernel"].shape[0])
        return dataclasses.replace(virtual, head=Head(kernel, params["head"].get("bias", jnp.zeros(kernel.shape[1]))))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of keys, values and the head."""
        virtual, outputs = super().spec(layout), self.outputs or 0
        if not self.task.has_head:
            return virtual
        return dataclasses.replace(virtual, head=Head(shape(layout.head_width, outputs), shape(outputs)))
