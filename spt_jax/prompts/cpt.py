"""Context-aware prompt tuning: virtual tokens that start at real ones and stay near them.

CPT (Blau et al. 2024, arXiv 2410.17222).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.tokenization import Tokenization
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model, TargetScores
from spt_jax.options import Line
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.method import DEFAULT_LENGTH, LeadTargets, PromptParams, TokenMethod
from spt_jax.prompts.virtual import VirtualPrompt

INPUT = 2


@dataclasses.dataclass(frozen=True)
class ContextObjective:
    """The weighted cross-entropy of virtual tokens that stand for real ones. Implements `AuxiliaryObjective`.

    Attributes:
      numbers: indices of the M virtual tokens.
      ids: the real id of each.
      weights: the loss weight of each.
    """

    numbers: tuple[int, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def check(self, lead_ids: Int[np.ndarray, "*S P"], vocab_size: int) -> None:
        """Checks that all virtual tokens are among the leading ids.

        Raises:
          ConfigError: they are not.
        """
        if not {vocab_size + number for number in self.numbers} <= set(lead_ids.flat):
            raise ConfigError("a context with labels must come first in data.prompt: put <soft> before any field")

    def targets(self, lead_ids: Int[Array, " P"], vocab_size: int) -> LeadTargets:
        """Returns the targets. The weight of a first token is 0, since nothing predicts it; of a missing one, NaN."""
        matches = lead_ids[None, :] == vocab_size + jnp.asarray(self.numbers)[:, None]
        positions = jnp.argmax(matches, axis=1)
        weights = jnp.where(positions > 0, jnp.asarray(self.weights, jnp.float32), 0.0)
        weights = jnp.where(matches.any(axis=1), weights, jnp.nan)
        return LeadTargets(jnp.maximum(positions - 1, 0)[None], jnp.asarray(self.ids)[None, :, None], weights[None])

    def loss(self, scores: TargetScores, targets: LeadTargets) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the weighted sum of the losses, and how many targets are counted."""
        losses = -targets.weights * scores.log_probabilities[:, :, 0]
        losses = jnp.where(targets.weights == 0, 0.0, losses)
        return jnp.sum(losses), jnp.sum((targets.weights > 0).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextPromptTuning(TokenMethod):
    """Virtual tokens that stay close to real ones.

    Attributes:
      name: the method.
      context: solved examples as text, with each label in [[ ]], such as "Who wrote it?\\n[[ person]]\\n".
      ids: token ids of the context; default those of `context`.
      init: initializer of the rows if neither `context` nor `ids` is given.
      kinds: the kind of each of the P tokens, modulo 4: 1 for the format of an input, 2 for the text of an input, 3 for
        the format of an output, 0 for a label, which is not trained. Numbers grow by 4 from one example of the context
        to the next. Default 2 for all tokens; for `context` 2 and 4, 6 and 8, and so on.
      decay: weight of the loss on the label of the last example of the context; its square for the example before, and
        so on. 0 for no such loss. The labels are known only with `context` or `ids`.
      epsilon: how far tokens of text may move from where they start (L2 norm), in units of sqrt(D / 2048).
      format_epsilon: the same for format tokens.
    """

    recipe: ClassVar[Mapping[str, Any]] = {"name": "adam", "learning_rate": 0.03, "schedule": "linear"}

    name: Literal["cpt"] = "cpt"
    context: Line = ""
    ids: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()
    decay: float = 0.95
    epsilon: float = 10.0
    format_epsilon: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, numbers in (("kinds", self.kinds), ("ids", self.ids)):
            if numbers and len(numbers) != self.token_count:
                raise ConfigError(f"method.{name} has {len(numbers)} numbers for {self.token_count} virtual tokens")
        if min((self.epsilon, self.format_epsilon, *self.kinds, *self.ids)) < 0:
            raise ConfigError("method.epsilon, format_epsilon, kinds and ids must be at least 0")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"method.decay is {self.decay}; it must be in [0, 1]")

    @property
    def token_count(self) -> int:
        """Number of virtual tokens that a template must place."""
        return self.length or len(self.kinds) or len(self.ids) or DEFAULT_LENGTH

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the context is still text."""
        return bool(self.context) and not self.ids

    def bind(self, tokenizer: Tokenizer) -> "ContextPromptTuning":
        """Returns the method with `ids` and `kinds` of the tokenized context.

        Raises:
          ConfigError: `length` is given and is not the length of the context.
        """
        if not self.needs_tokenizer:
            return self
        encode, ids, kinds = Tokenization(tokenizer).continuation, [], []
        for number, piece in enumerate(re.split(r"\[\[(.*?)\]\]", self.context, flags=re.DOTALL)):
            example, is_label = divmod(number, 2)
            ids += encode(piece)
            kinds += [4 * example + (4 if is_label else INPUT)] * (len(ids) - len(kinds))
        if self.length not in (None, len(ids)):
            raise ConfigError(f"method.context has {len(ids)} tokens; leave method.length={self.length} out")
        return dataclasses.replace(self, length=len(ids), ids=tuple(ids), kinds=tuple(kinds))

    def auxiliary(self) -> ContextObjective | None:
        """The labels of the context, with larger weights for later ones (Blau et al. 2024, section 3.3, as in PEFT)."""
        labels = sorted({kind for kind in self.kinds if kind and kind % 4 == 0}, reverse=True)
        if not self.ids or not self.decay or not labels:
            return None
        weights = {kind: self.decay ** (1 + rank) for rank, kind in enumerate(labels)}
        numbers = tuple(i for i, kind in enumerate(self.kinds) if kind in weights)
        ids, decays = (self.ids[i] for i in numbers), (weights[self.kinds[i]] for i in numbers)
        return ContextObjective(numbers, tuple(ids), tuple(decays))

    def init_params(self, key: Key[Array, ""], base: FrozenBase) -> dict[str, Float[Array, "P D"]]:
        """Returns the start rows (embeddings of the context) and their trained difference, zeros; float32.

        Raises:
          ConfigError: `bind` was not called, or an id is outside the vocabulary.
        """
        if self.needs_tokenizer:
            raise ConfigError("method.context is not tokenized yet: use method.bind(base.tokenizer)")
        if self.ids and max(self.ids) >= base.layout.vocab_size:
            raise ConfigError(f"method.ids go up to {max(self.ids)}; the vocabulary has {base.layout.vocab_size}")
        if self.ids:
            rows = base.model.embed(jnp.asarray(self.ids, jnp.int32)).astype(jnp.float32)
        else:
            rows = initialize(self.init, key, base, self.token_count)
        return {"start": rows, "delta": jnp.zeros_like(rows)}

    def materialize(self, params: Mapping[str, Any], model: Model) -> VirtualPrompt:
        """Returns start + delta as virtual tokens. Labels have no gradient."""
        del model
        free = jnp.asarray(self._radii(1) > 0, jnp.float32)[:, None]
        return VirtualPrompt(tokens=params["start"] + free * params["delta"], pinned=self.pins)

    def trainable(self, params: PromptParams) -> dict[str, bool]:
        """Only the difference is trained."""
        return {name: name == "delta" for name in params}

    def project(self, params: PromptParams) -> PromptParams:
        """Scales the difference of each token down to its maximum norm."""
        delta = params["delta"]
        radii = jnp.asarray(self._radii(delta.shape[1]))
        norms = jnp.linalg.norm(delta, axis=1)
        shrink = jnp.where(norms > radii, radii / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny), 1.0)
        return {**params, "delta": delta * shrink[:, None]}

    def _radii(self, width: int) -> np.ndarray:
        kinds = np.asarray(self.kinds or [INPUT] * self.token_count) % 4
        scale = math.sqrt(width / 2048)
        return np.select([kinds == INPUT, kinds > 0], [self.epsilon * scale, self.format_epsilon * scale], 0.0).astype(
            np.float32
        )
