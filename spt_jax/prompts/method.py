"""Base classes of soft-prompt methods: hyper-parameters with pure functions, in the style of Optax."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model, TargetScores
from spt_jax.prompts.initializers import Initializer
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt, shape
from spt_jax.runtime.reprs import short_repr

DEFAULT_LENGTH = 20
PromptParams = PyTree[Float[Array, "..."] | Float[np.ndarray, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeadTargets:
    """What an auxiliary objective predicts from the hidden states of the leading ids.

    Attributes:
      outputs: for each of M targets, the leading position that predicts it.
      ids: the K ids to score at each target.
      weights: the weight of each target.
    """

    outputs: Int[Array, "1 M"]
    ids: Int[Array, "1 M K"]
    weights: Float[Array, "1 M"]


@runtime_checkable
class AuxiliaryObjective(Protocol):
    """A loss on the leading ids, which all examples share, in addition to the objective of the examples."""

    def check(self, lead_ids: Int[np.ndarray, "*S P"], vocab_size: int) -> None:
        """Checks on the host that the leading ids contain what is predicted.

        Raises:
          ConfigError: they do not.
        """
        ...

    def targets(self, lead_ids: Int[Array, " P"], vocab_size: int) -> LeadTargets:
        """Returns the targets; virtual token i has the id `vocab_size + i`."""
        ...

    def loss(self, scores: TargetScores, targets: LeadTargets) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the sum of the losses of one example's leading ids, and the sum of the weights."""
        ...


# The methods of this package that train input embeddings only.
TOKEN_METHODS = (
    "prompt_tuning",
    "p_tuning",
    "low_rank_prompt_tuning",
    "residual_prompt_tuning",
    "decomposed_prompt_tuning",
    "multitask_prompt_tuning",
    "cpt",
    "progressive_prompts",
    "trained_tokens",
    "lopa",
)


def check_method(method: "Method", base: FrozenBase) -> None:
    """Checks a method, and its options, against a base, before training.

    Args:
      method: the method.
      base: the frozen base.

    Raises:
      ConfigError: the method needs layers that take keys and values or states, and those of the base take none; or as
        in `Method.check_base`.
    """
    virtual = method.spec(base.layout)
    if base.layout.only_tokens and any((virtual.prefix, virtual.gated, virtual.linear, virtual.edits)):
        raise ConfigError(
            f"{method.name} gives keys, values, states, maps or edits to layers, and {base.name} takes input embeddings"
            f" only; methods that work: {', '.join(TOKEN_METHODS)}"
        )
    method.check_base(base)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of the methods: frozen dataclasses whose fields are the options of `--method.*`.

    Training differentiates the parameters that `init_params` returns. All other code uses only the `VirtualPrompt` that
    `materialize` computes from them, and only that is saved.

    Attributes:
      name: name of the method.
    """

    # Fields of `OptimizerConfig` for which this method has better defaults than those of the base family.
    recipe: ClassVar[Mapping[str, Any]] = {}

    name: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = cls.__repr__  # as the class's own attribute, because `dataclass` would replace an inherited one

    __repr__ = short_repr

    def recipe_for(self, layout: Layout) -> Mapping[str, Any]:
        """Returns the recipe for a base; by default `recipe`.

        Args:
          layout: that of the base.
        """
        del layout
        return self.recipe

    @property
    def token_count(self) -> int:
        """Number of virtual tokens that a template must place; 0 for a method without token rows."""
        return 0

    @property
    def prefix_length(self) -> int:
        """Number of positions of the prefix, before the first token."""
        return 0

    @property
    def pins(self) -> bool:
        """Whether layers with a sliding window never hide the prompt from later tokens, `VirtualPrompt.pinned`."""
        return False

    @property
    def per_input(self) -> bool:
        """Whether the virtual tokens depend on the input of each example, so that examples share no leading ids."""
        return False

    @property
    def needs_tokenizer(self) -> bool:
        """Whether `bind` must be called first."""
        return False

    def bind(self, tokenizer: Tokenizer) -> "Method":
        """Returns the method with those options filled in that depend on the tokenizer of the base.

        Args:
          tokenizer: that of the base.
        """
        del tokenizer
        return self

    def auxiliary(self) -> AuxiliaryObjective | None:
        """Returns a loss on the leading ids that training adds to the objective; None for none."""
        return None

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Returns initial parameters, float32.

        Args:
          key: a typed PRNG key.
          base: the frozen base.

        Raises:
          ConfigError: the options are not compatible with the base.
        """
        raise NotImplementedError

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the soft prompt for these parameters. Differentiable.

        Args:
          params: the parameters, as from `init_params`.
          model: that of the base.
        """
        raise NotImplementedError

    def artifacts(self, virtual: VirtualPrompt, params: Mapping[str, Any]) -> dict[str, tuple["Method", VirtualPrompt]]:
        """Returns the prompts to save for a result of `materialize`, by subdirectory; "" for a single prompt.

        Args:
          virtual: the result of `materialize`.
          params: the parameters that it was computed from.
        """
        del params
        return {"": (self, virtual)}

    def trainable(self, params: PromptParams) -> PyTree[bool]:
        """Returns a tree of booleans: whether each leaf is trained.

        Args:
          params: the parameters.
        """
        return jax.tree.map(lambda _: True, params)

    def trainable_count(self, params: PromptParams) -> int:
        """Returns the number of trained parameters.

        Args:
          params: the parameters.
        """
        sizes = jax.tree.map(lambda leaf, trained: leaf.size if trained else 0, params, self.trainable(params))
        return sum(jax.tree.leaves(sizes))

    def project(self, params: PromptParams) -> PromptParams:
        """Projects the parameters after every update, for methods that constrain them.

        Args:
          params: the updated parameters.

        Returns:
          The parameters to continue with, of the same shapes and dtypes.
        """
        return params

    def spec(self, layout: Layout) -> VirtualPrompt:
        """Returns the result of `materialize` with a `jax.ShapeDtypeStruct` in place of every array.

        Saved prompts are checked against it. The default has token rows, keys and values; `shape` makes more leaves.

        Args:
          layout: that of the base.
        """
        tokens = shape(self.token_count, layout.width) if self.token_count else None
        prefix = memory.spec(layout.attention_groups, self.prefix_length)
        virtual = VirtualPrompt(tokens=tokens, prefix=VirtualPrefix(prefix) if self.prefix_length else None)
        return dataclasses.replace(virtual, pinned=self.pins)

    def check_base(self, base: FrozenBase) -> None:
        """Checks the options against a base, before training.

        Args:
          base: the frozen base.

        Raises:
          ConfigError: `pin_prefix` is set, and no layer of the base has a sliding window.
        """
        if self.pins and not base.layout.windowed:
            raise ConfigError(
                f"method.pin_prefix is True, but no layer of {base.name} has a sliding window; set it to False"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """Base class of the methods with a row for each virtual token.

    Attributes:
      length: number of virtual tokens P; default the sum over `<soft:n>` in the template, or 20.
      init: initializer of the rows.
      pin_prefix: in layers with a sliding window, every later token attends to the virtual tokens, however far back
        they are. By default the window hides them, as it hides other tokens.
    """

    length: int | None = None
    init: Initializer = dataclasses.field(default_factory=Initializer)
    pin_prefix: bool = False

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a soft prompt has at least 1 virtual token")

    @property
    def pins(self) -> bool:
        return self.pin_prefix

    @property
    def token_count(self) -> int:
        """Number of virtual tokens that a template must place."""
        return self.length or DEFAULT_LENGTH
