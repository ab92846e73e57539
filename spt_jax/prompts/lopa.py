"""LoPA: virtual tokens that a small network adapts to each input (Jain et al. 2024, arXiv 2405.15282)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.instance import InstanceGate
from spt_jax.prompts.method import TokenMethod
from spt_jax.prompts.networks import init_linear
from spt_jax.prompts.task_head import HeadMethod
from spt_jax.prompts.virtual import VirtualPrompt, shape

MAX_HIDDEN = 256  # as in the authors' code for language understanding


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankPromptAdaptation(HeadMethod, TokenMethod):
    """Virtual tokens that depend on each input.

    They are trained rows among the input embeddings, times factors that depend on the input of each example.

    The factors are sigmoid(U V^T), where two small networks compute U [P, r] and V [D, r] from the input. At the start,
    all factors are 1/2, and the rows are twice those of `init`. The authors' networks read the output of a separate
    encoder; these read the mean of the frozen base's own embeddings of the input (`InstanceGate`), which costs next to
    nothing. No rows can share the virtual tokens, so each runs through the base with its own.

    The prompt has a head if the task has one.

    Attributes:
      name: the method.
      rank: the rank r of the matrix in the sigmoid.
      hidden: width of the networks; default that of the base, at most 256.
    """

    # The best of 0.001, 0.003 and 0.01 on the validation records of the shipped task.
    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.001, "schedule": "linear"}

    name: Literal["lopa"] = "lopa"
    rank: int = 4
    hidden: int | None = None

    def __post_init__(self) -> None:
        TokenMethod.__post_init__(self)
        HeadMethod.__post_init__(self)
        for name, value in (("rank", self.rank), ("hidden", self.hidden)):
            if value is not None and value < 1:
                raise ConfigError(f"method.{name} is {value}; it must be at least 1")

    @property
    def per_input(self) -> bool:
        return True

    def check_base(self, base: FrozenBase) -> None:
        """Checks the options against a base.

        Raises:
          ConfigError: the base is an encoder-decoder; or as in `Method.check_base`.
        """
        if base.layout.encodes:
            raise ConfigError(f"{self.name} does not support encoder-decoders, such as {base.name}")
        super().check_base(base)

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns the rows [P, D], the layers of both networks, and the head; float32.

        Raises:
          ConfigError: the number of classes is unknown.
        """
        row_key, *keys = jax.random.split(key, 5)
        width, sizes = base.layout.width, self._sizes(base.layout)
        inner, outer = sizes["rows"]
        rows = {"inner": init_linear(keys[0], width, inner), "outer": init_linear(keys[1], inner, outer)}
        inner, outer = sizes["columns"]
        columns = {
            "inner": init_linear(keys[2], width, inner),
            "outer": {"kernel": jnp.zeros((inner, outer)), "bias": jnp.zeros(outer)},
        }
        tokens = 2 * initialize(self.init, row_key, base, self.token_count)
        return {"tokens": tokens, "rows": rows, "columns": columns, **self.init_head(base)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the rows and the networks, and the head."""
        del model
        gate = InstanceGate(*(jax.tree.map(jnp.asarray, params[name]) for name in ("rows", "columns")))
        virtual = VirtualPrompt(tokens=jnp.asarray(params["tokens"]), instance=gate, pinned=self.pins)
        return self.with_head(virtual, params)

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the shapes of the rows, the networks and the head."""

        def network(inner: int, outer: int) -> dict[str, Any]:
            return {
                "inner": {"kernel": shape(layout.width, inner), "bias": shape(inner)},
                "outer": {"kernel": shape(inner, outer), "bias": shape(outer)},
            }

        sizes = self._sizes(layout)
        gate = InstanceGate(network(*sizes["rows"]), network(*sizes["columns"]))
        return dataclasses.replace(super().spec(layout), instance=gate)

    def _sizes(self, layout: Layout) -> dict[str, tuple[int, int]]:
        """Returns the widths h and of the output of each network."""
        hidden = self.hidden or min(MAX_HIDDEN, layout.width)
        return {"rows": (hidden, self.token_count * self.rank), "columns": (hidden, layout.width * self.rank)}
