"""Examples after a text: what the bare base predicts with the text in its context, and how near another prompt comes.

The text takes the place of the soft prompt, at the beginning of the context. All other ids stay the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import BatchPlan, Rows, multiples, pack, place_batch, plan_batches, shared_length
from spt_jax.data.examples import Example
from spt_jax.data.streams import evaluation_batches
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.bare import in_order_of, target_states
from spt_jax.inference.forward import encode_prefix
from spt_jax.models.attention import Prefix
from spt_jax.models.model import Model
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.sharding import replicated, to_host

Ids = Int[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near predictions come to those of the base after a text, as means over all target tokens.

    Attributes:
      agreement: the share of tokens at which both have the same most probable next token.
      divergence: KL(p_text || p), in nats, where p_text is the distribution of the next token over the vocabulary after
        the text, and p the one compared with it.
    """

    agreement: float
    divergence: float


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The most probable next tokens at the M target tokens of an example, most probable first.

    Attributes:
      ids: their ids.
      log_probabilities: their log-probabilities, in nats.
      log_rest: the logarithm of the sum of all other probabilities; -inf if there are none.
    """

    ids: Int[np.ndarray, "M K"]
    log_probabilities: Float[np.ndarray, "M K"]
    log_rest: Float[np.ndarray, " M"]


def ids_after_text(base: FrozenBase, text: Ids, ids: Ids) -> Ids:
    """Returns the ids of a text and then those of a sequence, without its virtual tokens and a second BOS.

    Args:
      base: the frozen base.
      text: the ids of the text.
      ids: real and virtual ids.
    """
    return np.concatenate([text, ids[_kept(base, text, ids)]]).astype(np.int32)


def examples_after_text(base: FrozenBase, text: Ids, examples: Sequence[Example]) -> list[Example]:
    """Returns examples that begin with the text, without virtual tokens. They are numbered from 0 in this order.

    Args:
      base: the frozen base.
      text: the ids of the text.
      examples: the examples.

    Raises:
      DataError: the text and an example are longer than the context of the base.
    """
    found, positions = [], base.layout.max_positions
    for number, example in enumerate(examples):
        predicted = np.concatenate([np.zeros(len(text), bool), example.predicted[_kept(base, text, example.ids)]])
        ids = ids_after_text(base, text, example.ids)
        longer = dataclasses.replace(example, ids=ids, predicted=predicted, index=number, extra=None)
        if longer.length > positions:
            raise DataError(
                f"record {example.index + 1}: the text has {len(text):,} tokens and the record"
                f" {longer.length - len(text):,}, more than the {positions:,} positions of {base.name} together;"
                " shorten the text, or set data.max_length and data.truncate"
            )
        found.append(longer)
    return found


def plan_after_text(
    base: FrozenBase, examples: Sequence[Example], batch_size: int, *, packing: bool = False
) -> BatchPlan:
    """Returns the shapes of batches whose leading ids are the text and whatever else all examples begin with.

    Args:
      base: the frozen base.
      examples: the result of `examples_after_text`.
      batch_size: examples per batch.
      packing: whether examples share rows.
    """
    return plan_batches(
        examples,
        lead=shared_length([example.ids for example in examples], min(e.first_target for e in examples) - 1),
        batch_size=batch_size,
        packing=packing and base.layout.packs,
        **multiples(base.mesh),
        max_length=base.layout.max_positions,
    )


def top_tokens(
    base: FrozenBase, text: Ids, examples: Sequence[Example], count: int, batch_size: int = 64
) -> list[TopTokens]:
    """Returns the most probable next tokens after the text, at the target tokens of each example.

    Args:
      base: the frozen base.
      text: the ids of the text.
      examples: examples without choices.
      count: the number K of tokens.
      batch_size: examples per batch.

    Raises:
      ConfigError: the vocabulary has fewer tokens.
      DataError: the text and an example are longer than the context of the base.
    """
    size = base.layout.vocab_size
    if count > size:
        raise ConfigError(f"{count:,} tokens are asked for, and the vocabulary of {base.name} has {size:,}")
    arrays = _of_targets(base, text, examples, functools.partial(_top_tokens, count=count), batch_size)
    return [TopTokens(*own) for own in arrays]


def states_after_text(
    base: FrozenBase, text: Ids, examples: Sequence[Example], batch_size: int = 64
) -> list[Float[np.ndarray, "M D"]]:
    """Returns the hidden states after the text that predict the target tokens of each example, float32.

    Args:
      base: the frozen base.
      text: the ids of the text.
      examples: examples without choices.
      batch_size: examples per batch.

    Raises:
      DataError: the text and an example are longer than the context of the base.
    """
    return [states for (states,) in _of_targets(base, text, examples, _states, batch_size)]


def _of_targets(
    base: FrozenBase, text: Ids, examples: Sequence[Example], function: Callable[..., Any], batch_size: int
) -> list[tuple[np.ndarray, ...]]:
    """Returns for each example the rows of the arrays [B, M, ...] of a function at its targets, after the text."""
    longer = examples_after_text(base, text, examples)
    plan = plan_after_text(base, longer, batch_size, packing=True)
    prefix = _prefix(base.model, None, _placed_lead(base, plan))
    pending = [
        (batch.rows, function(base.model, prefix, rows=place_batch(batch, base.mesh).rows))
        for batch in evaluation_batches(longer, plan, batch_size)
    ]
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for rows, values in pending:
        arrays = [to_host(value) for value in values]
        for row, slot in zip(*np.nonzero(rows.examples >= 0), strict=True):
            mask = (rows.target_groups[row] == slot) & (rows.target_weights[row] > 0)
            found[int(rows.examples[row, slot])] = tuple(array[row, mask] for array in arrays)
    return [found[number] for number in range(len(examples))]


def agreement_with_text(
    base: FrozenBase,
    text: Ids,
    examples: Sequence[Example],
    lead: int | Sequence[int],
    virtual: VirtualPrompt | None,
    batch_size: int = 64,
    continued: Sequence[Example] | None = None,
) -> Agreement:
    """Compares the predictions under a soft prompt, or of the bare base, with those of the base after the text.

    The target tokens are those of the correct answers. Whole distributions are compared, without a limit on tokens.

    Args:
      base: the frozen base.
      text: the ids of the text.
      examples: the examples, numbered from 0; of choices, the correct one counts.
      lead: the leading ids that they share, as for `plan_batches`.
      virtual: the soft prompt; None for none.
      batch_size: examples per batch.
      continued: the examples as they follow the text, with the same targets; None for `examples`.

    Raises:
      DataError: the text and an example are longer than the context of the base.
    """
    own = [dataclasses.replace(example.as_target(), extra=None) for example in examples]
    following = own if continued is None else [example.as_target() for example in continued]
    longer = examples_after_text(base, text, following)
    limits = {**multiples(base.mesh), "max_length": base.layout.max_positions}
    plan = plan_batches(own, lead=lead, batch_size=batch_size, packing=False, **limits)
    text_plan = plan_after_text(base, longer, batch_size)
    prefixes = (
        _prefix(base.model, virtual, _placed_lead(base, plan)),
        _prefix(base.model, None, _placed_lead(base, text_plan)),
    )
    pending = []
    for some in _chunks(own, batch_size):
        one, other = pack(some, plan), pack([longer[example.index] for example in some], text_plan)
        placed = (place_batch(batch, base.mesh).rows for batch in (one, in_order_of(one, other)))
        pending.append(_compared(base.model, virtual, prefixes, tuple(placed)))
    same, divergence = (sum(float(np.sum(to_host(part[i]), dtype=np.float64)) for part in pending) for i in (0, 1))
    tokens = sum(int(example.predicted.sum()) for example in own)
    return Agreement(same / tokens, divergence / tokens)


def _kept(base: FrozenBase, text: Ids, ids: Ids) -> Bool[np.ndarray, " _"]:
    """Returns which ids follow the text: the real ones, without a BOS where the text has one."""
    kept = ids < base.layout.vocab_size
    bos = base.tokenizer.bos_token_id
    real = np.flatnonzero(kept)
    if bos is not None and len(real) and text[0] == bos == ids[real[0]]:
        kept[real[0]] = False
    return kept


def _chunks(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    ordered = sorted(examples, key=lambda example: (example.length, example.index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _placed_lead(base: FrozenBase, plan: BatchPlan) -> tuple[Array, Array | None]:
    lead = (plan.lead_ids, plan.lead_length)
    return jax.tree.map(lambda array: jax.device_put(array, replicated(base.mesh)), lead)


@jax.jit
def _prefix(model: Model, virtual: VirtualPrompt | None, lead: tuple[Array, Array | None]) -> Prefix | None:
    return encode_prefix(model, virtual, *lead)


@functools.partial(jax.jit, static_argnames="count")
def _top_tokens(model: Model, prefix: Prefix | None, rows: Rows, count: int) -> tuple[Array, Array, Array]:
    """Returns the ids [B, M, K], their log-probabilities, and the log of the rest [B, M]."""

    def of_target(hidden: Float[Array, "B D"]) -> tuple[Array, Array, Array]:
        logits = model.logits(hidden)
        total = jax.nn.logsumexp(logits, axis=-1)
        top, ids = jax.lax.top_k(logits, count)
        listed = jnp.zeros(logits.shape, bool).at[jnp.arange(len(ids))[:, None], ids].set(True)
        rest = jax.nn.logsumexp(jnp.where(listed, -jnp.inf, logits), axis=-1)
        return ids, top - total[:, None], rest - total

    values = jax.lax.map(of_target, target_states(model, None, prefix, rows))
    return jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), values)


@jax.jit
def _states(model: Model, prefix: Prefix | None, rows: Rows) -> tuple[Float[Array, "B M D"]]:
    return (jnp.swapaxes(target_states(model, None, prefix, rows), 0, 1).astype(jnp.float32),)


@jax.jit
def _compared(
    model: Model,
    virtual: VirtualPrompt | None,
    prefixes: tuple[Prefix | None, Prefix | None],
    rows: tuple[Rows, Rows],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns for each row the number of equal most probable tokens, and the sum of the divergences."""

    def of_target(states: tuple[Float[Array, "B D"], Float[Array, "B D"]]) -> tuple[Array, Array]:
        log_q, log_p = (jax.nn.log_softmax(model.logits(hidden), axis=-1) for hidden in states)
        same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        return same.astype(jnp.float32), jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    student = target_states(model, virtual, prefixes[0], rows[0])
    values = jax.lax.map(of_target, (student, target_states(model, None, prefixes[1], rows[1])))
    real = rows[0].target_weights > 0
    same, divergence = (jnp.sum(jnp.where(real, value.T, 0.0), axis=-1) for value in values)
    return same, divergence
