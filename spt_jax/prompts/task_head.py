"""Task heads: a linear map that is trained and saved with a soft prompt, in place of the base's output matrix."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from spt_jax.bases.base import FrozenBase
from spt_jax.data.task import TASKS, Task
from spt_jax.data.templates import TEXT
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.models.layout import Layout
from spt_jax.prompts.method import Method
from spt_jax.prompts.virtual import Head, VirtualPrompt, shape

HEAD_UNIT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMethod(Method):
    """Base class of the methods that may have a task head.

    Attributes:
      head: a linear map that is trained and saved with the prompt. classification predicts a class from the last token,
        of an encoder from what its family pools, tagging one for every word of the field `data.reads`, span the start
        and the end of an answer in that field. language_model uses the output matrix of the frozen base instead. The
        default is that of `task.name`.
      classes: number of classes of a classification or tagging head; default the number of verbalizers, or of tags in
        the data.
      head_bias: whether the head has a bias.
    """

    head: str | None = None
    classes: int | None = None
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in TASKS:
            raise ConfigError(f"method.head is {self.head!r}; {did_you_mean(self.head, TASKS)}")
        if self.classes is not None and self.classes < 2:
            raise ConfigError(f"method.classes is {self.classes}; a head needs at least 2 classes")
        # Without `head`, the task decides, which may not be known yet.
        if self.classes is not None and self.head and (not self.task.has_head or self.task.outputs is not None):
            raise ConfigError(f"method.classes={self.classes} is not compatible with method.head={self.head}")

    @property
    def task(self) -> Task:
        """The task of the head."""
        return TASKS[self.head or TEXT]

    @property
    def outputs(self) -> int | None:
        """Number of outputs of the head: the classes, or the number that the task fixes."""
        return self.task.outputs or self.classes

    def init_head(self, base: FrozenBase) -> dict[str, Any]:
        """Returns parameters with a `head` [D, C] of zeros: all classes are equally likely. Without a head, none.

        The kernel is in units of 32 / D, so that one learning rate changes the logits equally for every width.

        Args:
          base: the frozen base.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        if not self.task.has_head:
            return {}
        if self.outputs is None:
            raise ConfigError("method.classes is not set, and there are no verbalizers to count")
        head = {"kernel": jnp.zeros((base.layout.head_width, self.outputs))}
        return {"head": {**head, "bias": jnp.zeros(self.outputs)} if self.head_bias else head}

    def with_head(self, virtual: VirtualPrompt, params: Mapping[str, Any]) -> VirtualPrompt:
        """Returns a prompt with the head of these parameters, if they have one.

        Args:
          virtual: the other parts of the prompt.
          params: the parameters.
        """
        if "head" not in params:
            return virtual
        kernel = params["head"]["kernel"] * (HEAD_UNIT / params["head"]["kernel"].shape[0])
        return dataclasses.replace(virtual, head=Head(kernel, params["head"].get("bias", jnp.zeros(kernel.shape[1]))))

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the prompt and the head."""
        virtual, outputs = super().spec(layout), self.outputs or 0
        if not self.task.has_head:
            return virtual
        return dataclasses.replace(virtual, head=Head(shape(layout.head_width, outputs), shape(outputs)))
