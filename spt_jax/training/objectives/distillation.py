"""The objective of distillation: what the base says with a text in its context, learned by a soft prompt."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Rows
from spt_jax.data.examples import Example
from spt_jax.data.remembered import remembered_system, system_ids, text_ids
from spt_jax.data.sources import read_text
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.after_text import TopTokens, states_after_text, top_tokens
from spt_jax.models.model import TargetScores, TeacherStates
from spt_jax.training.objectives.objective import Loss, Objective
from spt_jax.training.objectives.targets import of_targets

# What questions that the base writes about the text are about.
Kind = Literal["facts", "summary", "structure", "use", "creative"]
# float32 does not resolve 1 minus a probability that is nearer to 1.
_LEAST_REST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """KL divergence from the bare base with a text in its context to the soft prompt (Hinton et al. 2015).

    The teacher is the same base after the text, without the soft prompt, with the same targets (`examples_after_text`).
    At each target token, p is the teacher's distribution of the next token, and q that under the soft prompt. Both are
    taken over k + 1 outcomes: the k tokens that are most probable for the teacher, and all others together, whose
    probability is the rest. With the temperature T, p_T and q_T are proportional to p^(1/T) and q^(1/T), and the loss
    is the mean over the target tokens of T^2 KL(p_T || q_T), in nats. With k = V there is no rest, and the loss is that
    over the whole vocabulary, where p_T is the softmax of logits / T.

    The teacher's k tokens are computed once, before training. A rest of q below 1e-6 counts as 1e-6. With k = 0, the
    teacher's hidden state at each target is stored instead, and the loss over the whole vocabulary is computed from it
    in chunks, which hold no more than a part of the logits.

    Attributes:
      text: the file of the text, UTF-8, or its URL.
      top_k: k, at most the size of the vocabulary; 0 for the whole vocabulary, from hidden states.
      temperature: T; positive.
      chat_system: whether the text is the system turn of chats, rather than plain text before everything else.
      system_rest: what chats that continue a system turn have of it, `Template.system`; None for chats from their
        beginning. It follows from data.continues and data.system, so that it is no option of the command line.
      answer_tokens: if positive, records without a target get one: what the base generates after the text, of at most
        this many tokens. 0 needs a target in every record.
      answer_temperature: the temperature of these answers; 0 takes the most probable tokens.
      study: the number of questions about the text that the base writes and answers, as training records beside those
        of data.train, or without any. It needs answer_tokens.
      study_validation: further questions, as validation records, where no validation data is given.
      study_kinds: the kinds of questions, which take turns.
      study_tokens: the maximum number of tokens of a question.
      study_temperature: the temperature of the questions.

    Raises:
      ConfigError: a field is out of its range.
    """

    text: str
    top_k: int = 32
    temperature: float = 1.0
    chat_system: bool = False
    system_rest: Annotated[str | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    answer_tokens: int = 0
    answer_temperature: float = 0.0
    study: int = 0
    study_validation: int = 0
    study_kinds: tuple[Kind, ...] = typing.get_args(Kind)
    study_tokens: int = 48
    study_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("loss.text is empty; it is the file of the text that the soft prompt learns")
        if self.top_k < 0:
            raise ConfigError(f"loss.top_k is {self.top_k}; it must be at least 0, which is the whole vocabulary")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"loss.temperature is {self.temperature}; it must be positive and finite")
        if self.answer_tokens < 0:
            raise ConfigError(f"loss.answer_tokens is {self.answer_tokens}; it must be at least 0")
        if not 0 <= self.answer_temperature < math.inf:
            raise ConfigError(f"loss.answer_temperature is {self.answer_temperature}; it must be at least 0 and finite")
        self._check_study()

    def _check_study(self) -> None:
        for name in ("study", "study_validation"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; it must be at least 0")
        if self.study_validation and not self.study:
            raise ConfigError(f"loss.study_validation is {self.study_validation}; it needs loss.study")
        if self.study and not self.answer_tokens:
            raise ConfigError(f"loss.study is {self.study}; it needs loss.answer_tokens, the most tokens of an answer")
        if not self.study_kinds or len(set(self.study_kinds)) < len(self.study_kinds):
            raise ConfigError(f"loss.study_kinds is {self.study_kinds}; it must name at least one kind, and none twice")
        if self.study_tokens < 1:
            raise ConfigError(f"loss.study_tokens is {self.study_tokens}; it must be at least 1")
        if not 0 <= self.study_temperature < math.inf:
            raise ConfigError(f"loss.study_temperature is {self.study_temperature}; it must be at least 0 and finite")

    def text_ids(self, base: FrozenBase) -> Int[np.ndarray, " P"]:
        """Returns the ids of the text.

        Args:
          base: the frozen base.

        Raises:
          ConfigError: the base has an encoder, the vocabulary has fewer than `top_k` tokens, or its chat template
            does not begin a chat with its system turn, or has another rest of it.
          DataError: the file cannot be read, or the text is empty or longer than the context.
        """
        if not base.layout.causal:
            raise ConfigError(f"{base.name} has an encoder: its memory of a text depends on what follows the text")
        if self.top_k > base.layout.vocab_size:
            raise ConfigError(
                f"loss.top_k is {self.top_k:,}, and the vocabulary of {base.name} has {base.layout.vocab_size:,} tokens"
            )
        try:
            text = read_text(self.text)
            if self.chat_system and self.system_rest is not None:
                return self._remembered(base, text)
            return system_ids(base, text) if self.chat_system else text_ids(base, text)
        except DataError as error:
            raise DataError(f"loss.text={self.text}: {error}") from error

    def _remembered(self, base: FrozenBase, text: str) -> Int[np.ndarray, " P"]:
        """Returns the ids of the system turn before its rest."""
        found = remembered_system(base, text)
        if found.template.system != self.system_rest:
            raise ConfigError(
                f"data.system is {self.system_rest!r}, but what is left of the system turn with this text is"
                f" {found.template.system!r}; set data.system to that"
            )
        return found.ids

    def prepare(self, base: FrozenBase, examples: Sequence[Example]) -> Sequence[PyTree]:
        """Returns the teacher's most probable tokens or hidden states, padded to the most targets of an example."""
        if not self.top_k:
            states = states_after_text(base, self.text_ids(base), examples)
            most = max(map(len, states))
            return [{"states": np.pad(own, [(0, most - len(own)), (0, 0)])} for own in states]
        found = top_tokens(base, self.text_ids(base), examples, self.top_k)
        most = max(len(own.ids) for own in found)
        whole = self.top_k == base.layout.vocab_size
        return [_padded(own, most, with_rest=not whole) for own in found]

    def scored_ids(self, rows: Rows) -> Int[Array, "B M K"]:
        """Returns the teacher's most probable tokens at each target; the target with the whole vocabulary."""
        if not self.top_k:
            return super().scored_ids(rows)
        return of_targets(_prepared(rows)["ids"], rows)

    def teacher(self, rows: Rows) -> TeacherStates | None:
        """Returns the teacher's hidden states for the whole vocabulary; None for a number of tokens."""
        if self.top_k:
            return None
        return TeacherStates(of_targets(_prepared(rows)["states"], rows), self.temperature)

    def loss(self, scores: TargetScores, rows: Rows) -> Loss:
        """Returns the weighted sum of the divergences, and the sum of the weights of the target tokens."""
        values = scores.divergences if not self.top_k else self._of_top_tokens(scores, rows)
        assert values is not None
        weights, values = rows.target_weights, self.temperature**2 * values
        return jnp.sum(jnp.where(weights > 0, weights * values, 0.0)), jnp.sum(weights)

    def _of_top_tokens(self, scores: TargetScores, rows: Rows) -> Float[Array, "B M"]:
        prepared = _prepared(rows)
        teacher = of_targets(prepared["log_probabilities"], rows)
        student = scores.log_probabilities
        if "log_rest" in prepared:
            teacher = jnp.concatenate([teacher, of_targets(prepared["log_rest"][..., None], rows)], axis=-1)
            listed = jnp.minimum(jax.nn.logsumexp(student, axis=-1, keepdims=True), -_LEAST_REST)
            student = jnp.concatenate([student, jnp.log(-jnp.expm1(listed))], axis=-1)
        return _divergence(teacher / self.temperature, student / self.temperature)


def _prepared(rows: Rows) -> Mapping[str, Array]:
    """Returns what `Distillation.prepare` returned, in the arrays of the rows.

    Raises:
      ConfigError: the examples of the rows were not prepared.
    """
    if rows.extra is None:
        raise ConfigError("Distillation needs the teacher's tokens; call prepare_examples before packing")
    return typing.cast(Mapping[str, Array], rows.extra)


def _divergence(teacher: Float[Array, "B M O"], student: Float[Array, "B M O"]) -> Float[Array, "B M"]:
    """Returns KL(p || q) of distributions that are given as unnormalized log-probabilities."""
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _padded(tokens: TopTokens, most: int, *, with_rest: bool) -> Mapping[str, np.ndarray]:
    """Returns the arrays of an example, with `most` targets. A rest of nothing is finite, and counts as nothing."""
    arrays = {"ids": tokens.ids, "log_probabilities": tokens.log_probabilities}
    if with_rest:
        arrays["log_rest"] = np.maximum(tokens.log_rest, np.float32(-1e4))
    missing = most - len(tokens.ids)
    return {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in arrays.items()}
