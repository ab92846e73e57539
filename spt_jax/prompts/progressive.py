"""Progressive prompts: a new prompt before the frozen ones of earlier tasks (Razdaibiedina et al. 2023).

arXiv 2301.12314.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model
from spt_jax.prompts.initializers import Initializer, initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, Method, PromptParams, TokenMethod
from spt_jax.prompts.prompt_tuning import PromptTuning
from spt_jax.prompts.transfer import concatenate, token_rows
from spt_jax.prompts.virtual import VirtualPrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressivePrompts(TokenMethod):
    """Virtual tokens before those of earlier tasks.

    The earlier ones stay as they are. The prompt is saved whole, as one of prompt tuning, so that it needs no other
    file and can be the earlier prompt of the next task. As in the paper, the newest virtual tokens come first.

    Attributes:
      name: the method.
      previous: a saved prompt of virtual tokens, of the same base: a directory, a URL or a hub id; "" for the first
        task, which is then prompt tuning.
      length: number of virtual tokens P, those of the earlier prompt included; default the sum over `<soft:n>` in the
        template, or 20 more than the earlier prompt has.
      kept: number of virtual tokens of the earlier prompt; read from it by default.
      init: initializer of the new rows.
    """

    recipe: ClassVar[Mapping[str, Any]] = PromptTuning.recipe

    name: Literal["progressive_prompts"] = "progressive_prompts"
    previous: str = ""
    kept: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept is not None and self.kept < (1 if self.previous else 0):
            raise ConfigError(f"method.kept is {self.kept}; leave it out, it is read from method.previous")
        if self.kept and not self.previous:
            raise ConfigError(f"method.kept is {self.kept}, but method.previous names no prompt")
        if self.length is not None and self.length <= (self.kept or 0):
            raise ConfigError(
                f"method.length is {self.length}, of which {self.kept} virtual tokens are those of {self.previous}:"
                f" it must be at least {(self.kept or 0) + 1}"
            )

    @property
    def token_count(self) -> int:
        """Number of virtual tokens that a template must place, those of the earlier prompt included."""
        return self.length or (self.kept or 0) + DEFAULT_LENGTH

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the length of the earlier prompt is not read yet."""
        return bool(self.previous) and self.kept is None

    def bind(self, tokenizer: Tokenizer) -> "ProgressivePrompts":
        """Returns the method with `kept`, read from the earlier prompt.

        Raises:
          CheckpointError, ConfigError: there is no such prompt, it does not consist of virtual tokens only, or `length`
            leaves no room for new ones.
        """
        del tokenizer
        if not self.needs_tokenizer:
            return self
        from spt_jax.prompts.storage import read_prompt

        return dataclasses.replace(self, kept=len(self._rows(read_prompt(self.previous).virtual)))

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "N D"]]:
        """Returns the new rows `tokens` and, if there are some, the rows `kept` of the earlier prompt; float32.

        Raises:
          ConfigError: `bind` was not called, or the earlier prompt is not as in `bind`, or has another `pin_prefix`.
          CheckpointError: it is for another base.
        """
        if not self.previous:
            return {"tokens": initialize(self.init, key, base, self.token_count)}
        if self.kept is None:
            raise ConfigError("method.previous is not read yet: use method.bind(base.tokenizer)")
        from spt_jax.prompts.storage import load_prompt

        virtual = load_prompt(self.previous, base).virtual
        rows = self._rows(virtual)
        if len(rows) != self.kept:
            raise ConfigError(f"{self.previous}: has {len(rows)} virtual tokens, and method.kept is {self.kept}")
        if virtual.pinned is not self.pins:
            raise ConfigError(f"{self.previous}: was trained with method.pin_prefix={virtual.pinned}; set it likewise")
        return {"tokens": initialize(self.init, key, base, self.token_count - self.kept), "kept": jnp.asarray(rows)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns the new rows, then the earlier ones."""
        del model
        parts = [params["tokens"], *([params["kept"]] if "kept" in params else [])]
        return concatenate([VirtualPrompt(tokens=rows, pinned=self.pins) for rows in parts])

    def trainable(self, params: PromptParams) -> dict[str, bool]:
        """The earlier rows are not trained."""
        return {name: name == "tokens" for name in params}

    def artifacts(self, virtual: VirtualPrompt, params: Mapping[str, Any]) -> dict[str, tuple[Method, VirtualPrompt]]:
        """Returns one prompt of all rows, which is one of prompt tuning."""
        del params
        # Not the initializer of some of the rows, from which `inspect` would compute where all of them started.
        init = Initializer(name="array", rows=()) if self.kept else self.init
        return {"": (PromptTuning(length=self.token_count, init=init, pin_prefix=self.pin_prefix), virtual)}

    def _rows(self, virtual: VirtualPrompt) -> Float[Array, "N D"]:
        try:
            return token_rows(virtual)
        except ConfigError as error:
            raise ConfigError(f"method.previous is {self.previous}: {error}") from error
