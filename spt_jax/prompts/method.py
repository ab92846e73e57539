"""What a method of the soft-prompt family is: hyper-parameters with pure functions, in the manner of Optax."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.checkpoint import Params
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.prompts.initializers import Initializer
from spt_jax.prompts.virtual import VirtualPrompt

DEFAULT_LENGTH = 20
PromptParams = PyTree[Float[Array, "..."] | Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods: frozen dataclasses whose fields are the options of `--method.*`.

    Training differentiates the parameters that `init_params` makes; everything else sees only the `VirtualPrompt` that
    `materialize` turns them into, and that alone is saved.

    Attributes:
      name: the method's name.
    """

    # Fields of `OptimizerConfig` that this method does better with than with the base family's defaults.
    recipe: ClassVar[Mapping[str, Any]] = {}

    name: str

    @property
    def token_count(self) -> int:
        """Virtual tokens that a template must place; 0 for a method without token rows."""
        return 0

    @property
    def prefix_length(self) -> int:
        """Positions that keys and values take up before the first token."""
        return 0

    @property
    def needs_tokenizer(self) -> bool:
        """Whether options are left to `bind`."""
        return False

    def bind(self, tokenizer: Any) -> "Method":
        """The method with those options that only the base's tokenizer tells."""
        del tokenizer
        return self

    @property
    def context_targets(self) -> tuple[tuple[int, int, float], ...]:
        """Virtual tokens that are to be predicted themselves: number, real id and weight of each."""
        return ()

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Any]:
        """Fresh parameters, float32.

        Raises:
          ConfigError: the options do not fit the base.
        """
        raise NotImplementedError

    def materialize(self, module: Decoder, frozen: Params, params: Mapping[str, Any]) -> VirtualPrompt:
        """The soft prompt that the parameters stand for. Differentiable."""
        raise NotImplementedError

    def artifacts(self, virtual: VirtualPrompt, params: Mapping[str, Any]) -> dict[str, tuple["Method", VirtualPrompt]]:
        """What to save of `materialize`'s result: prompts by the subdirectories they go to, "" for a single one."""
        del params
        return {"": (self, virtual)}

    def trainable(self, params: PromptParams) -> PyTree[bool]:
        """Which leaves the optimizer may change."""
        return jax.tree.map(lambda _: True, params)

    def trainable_count(self, params: PromptParams) -> int:
        """Numbers that the optimizer may change."""
        free = jax.tree.map(lambda leaf, free: leaf.size if free else 0, params, self.trainable(params))
        return sum(jax.tree.leaves(free))

    def project(self, params: PromptParams) -> PromptParams:
        """What the parameters become after every update, for methods that keep them within bounds."""
        return params

    def virtual_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays of `materialize`'s result, by their names in a saved prompt, such as "prefix/keys".

        base: the sizes of the base by their names in `DecoderConfig`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        if self.token_count:
            shapes["tokens"] = (self.token_count, base["width"])
        if self.prefix_length:
            keys = (base["layers"], self.prefix_length, base["kv_heads"], base["head_size"])
            shapes |= {"prefix/keys": keys, "prefix/values": keys}
        return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """Base of the methods whose virtual tokens have rows of their own.

    Attributes:
      length: virtual tokens P; default the sum of the template's `<soft:n>`, or 20.
      init: where the rows start.
    """

    length: int | None = None
    init: Initializer = dataclasses.field(default_factory=Initializer)

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ConfigError(f"method.length is {self.length}; a soft prompt has at least 1 virtual token")

    @property
    def token_count(self) -> int:
        """Virtual tokens that a template must place."""
        return self.length or DEFAULT_LENGTH
