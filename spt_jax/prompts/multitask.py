"""Multitask prompt tuning: a shared prompt and a low-rank matrix per task (Wang et al. 2023, arXiv 2303.02861)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import Method, TokenMethod
from spt_jax.prompts.prompt_tuning import PromptTuning
from spt_jax.prompts.virtual import VirtualPrompt, shape

# Directory of the shared prompt, next to those of the tasks.
SHARED = "shared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(TokenMethod):
    """A shared prompt, and a low-rank matrix per task.

    `data.task` names the field with the task of a record.

    Attributes:
      name: the method.
      combine: how the matrix of a task is combined with the shared rows: multiply (elementwise, as in the paper) or
        add; concatenate instead appends rows for each task to the shared ones, half of the length.
      rank: rank of the matrix of a task, for multiply and add.
      tasks: names of the tasks, in the order of their matrices; default the values of `data.task` in the training data.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}

    name: Literal["multitask_prompt_tuning"] = "multitask_prompt_tuning"
    combine: Literal["multiply", "add", "concatenate"] = "multiply"
    rank: int = 1
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"method.rank is {self.rank}; the matrix of a task has at least rank 1")
        invalid = [name for name in self.tasks if not re.fullmatch(r"\w[\w .-]*", name) or name == SHARED]
        if invalid or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(
                f"method.tasks are {', '.join(map(repr, self.tasks))}: each names a directory, so they must be distinct"
                f" names of letters, digits, '_', '.', '-' and spaces, and not {SHARED!r}"
            )
        if self.combine == "concatenate" and self.token_count < 2:
            raise ConfigError("method.combine=concatenate needs at least 2 virtual tokens: one shared and one per task")

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "..."]]:
        """Returns the shared rows and, for S tasks, factors [S, P, r] and [S, r, D] or rows [S, P // 2, D]; float32.

        Every task starts at the shared prompt: the matrix starts near 1 for multiply, at 0 for add.

        Raises:
          ConfigError: no tasks are given.
        """
        count = len(self.tasks)
        if not count:
            raise ConfigError("method.tasks is empty; set data.task to the field with the task of a record")
        row_key, left_key, right_key = jax.random.split(key, 3)
        rows = initialize(self.init, row_key, base, self.token_count)
        if self.combine == "concatenate":
            per_task = self.token_count // 2
            return {"tokens": rows[:-per_task], "own": jnp.repeat(rows[None, -per_task:], count, axis=0)}
        left = jax.random.normal(left_key, (count, self.token_count, self.rank))
        right = jax.random.normal(right_key, (count, self.rank, rows.shape[1]))
        if self.combine == "add":
            return {"tokens": rows, "left": left * self.rank**-0.5, "right": jnp.zeros_like(right)}
        return {"tokens": rows, "left": 1 + 0.02 * left, "right": (1 + 0.02 * right) / self.rank}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows of every task, with a leading S axis."""
        del model
        shared = params["tokens"][None]
        if self.combine == "concatenate":
            shared = jnp.broadcast_to(shared, (params["own"].shape[0], *shared.shape[1:]))
            return VirtualPrompt(tokens=jnp.concatenate([shared, params["own"]], axis=1), pinned=self.pins)
        matrices = params["left"] @ params["right"]
        rows = shared * matrices if self.combine == "multiply" else shared + matrices
        return VirtualPrompt(tokens=rows, pinned=self.pins)

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shape of the rows of all tasks."""
        return VirtualPrompt(tokens=shape(len(self.tasks), self.token_count, layout.width), pinned=self.pins)

    def artifacts(self, virtual: VirtualPrompt, params: Mapping[str, Any]) -> dict[str, tuple[Method, VirtualPrompt]]:
        """Returns a prompt per task, and the shared prompt as a start for new tasks."""
        assert virtual.tokens is not None
        rows = {SHARED: params["tokens"], **dict(zip(self.tasks, virtual.tokens, strict=True))}

        def of_task(tokens: Float[Array, "P D"]) -> tuple[Method, VirtualPrompt]:
            method = PromptTuning(length=len(tokens), init=self.init, pin_prefix=self.pin_prefix)
            return method, VirtualPrompt(tokens=tokens, pinned=self.pins)

        return {name: of_task(jnp.asarray(tokens)) for name, tokens in rows.items()}
