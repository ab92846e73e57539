"""Pairs under the bare base: the same examples without virtual tokens, and how far a soft prompt moves the base."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan, Rows, multiples, pack, place_batch, plan_batches, shared_length
from spt_jax.data.examples import Example, moved_places
from spt_jax.errors import DataError
from spt_jax.inference.forward import encode_prefix, output_states, target_scores
from spt_jax.models.attention import Prefix
from spt_jax.models.model import Model
from spt_jax.prompts import VirtualPrompt
from spt_jax.runtime.sharding import to_host


def bare_examples(base: FrozenBase, examples: Sequence[Example]) -> list[Example]:
    """Returns examples with choices as the bare base sees them: without virtual tokens, all other ids the same.

    They are numbered from 0 in this order.

    Args:
      base: the frozen base.
      examples: examples with choices.

    Raises:
      DataError: without virtual tokens, an example has no token before its choices.
    """
    bare = []
    for number, example in enumerate(examples):
        real = example.ids < base.layout.vocab_size
        ids = example.ids[real]
        if len(ids) == 0:
            raise DataError(
                f"record {example.index + 1}: without its virtual tokens the prompt is empty; the bare base, which it"
                " is compared with, needs a token before the answers"
            )
        nothing = np.zeros(len(ids), bool)
        moved = {"ids": ids, "predicted": nothing, **moved_places(example, real)}
        bare.append(dataclasses.replace(example, **moved, index=number, prompt=0, extra=None))
    return bare


def bare_plan(base: FrozenBase, bare: Sequence[Example], batch_size: int, *, packing: bool) -> BatchPlan:
    """Returns the shapes of batches of the bare examples.

    Args:
      base: the frozen base.
      bare: the result of `bare_examples`.
      batch_size: examples per batch.
      packing: whether examples share rows.
    """
    ids = [example.ids for example in bare]
    return plan_batches(
        bare,
        lead=shared_length(ids, min(map(len, ids)) - 1),
        batch_size=batch_size,
        packing=packing,
        **multiples(base.mesh),
        max_length=base.layout.max_positions,
    )


def divergence(
    base: FrozenBase,
    examples: Sequence[Example],
    lead: int | Sequence[int],
    virtual: VirtualPrompt,
    batch_size: int = 64,
) -> float:
    """Returns the mean Kullback-Leibler divergence KL(p || p_base) of the next token in the chosen answers, in nats.

    At each token of each chosen answer, p is the distribution over the vocabulary under the soft prompt and p_base that
    under the bare base, given the same text. It is exact for these contexts; the divergence over answers that the tuned
    model itself would write may differ.

    Args:
      base: the frozen base.
      examples: pairs, numbered from 0, whose first choice is the chosen answer.
      lead: the leading ids that they share, as for `plan_batches`.
      virtual: the soft prompt.
      batch_size: examples per batch.
    """
    chosen = [dataclasses.replace(example, choices=example.choices[:1], extra=None) for example in examples]
    bare = bare_examples(base, chosen)
    limits = {**multiples(base.mesh), "max_length": base.layout.max_positions}
    plan = plan_batches(chosen, lead=lead, batch_size=batch_size, packing=False, **limits)
    bare_shapes = bare_plan(base, bare, batch_size, packing=False)
    ordered = sorted(chosen, key=lambda example: (example.length, example.index))
    pending = []
    for start in range(0, len(ordered), batch_size):
        some = ordered[start : start + batch_size]
        soft, other = pack(some, plan), pack([bare[example.index] for example in some], bare_shapes)
        other = in_order_of(soft, other)
        pending.append(_batch_divergence(base.model, virtual, *(place_batch(b, base.mesh) for b in (soft, other))))
    total = sum(float(np.sum(to_host(part), dtype=np.float64)) for part in pending)
    return total / sum(len(example.choices[0]) for example in chosen)


def in_order_of(one: Batch, other: Batch) -> Batch:
    """Returns the other batch, whose rows are one example each, with its rows in the order of those of the first.

    Args:
      one: a batch on the host whose rows are one example each.
      other: a batch of the same examples.
    """
    places = {int(number): row for row, number in enumerate(other.rows.examples[:, 0]) if number >= 0}
    spare = iter([row for row, number in enumerate(other.rows.examples[:, 0]) if number < 0])
    order = np.asarray([places[int(n)] if n >= 0 else next(spare) for n in np.asarray(one.rows.examples[:, 0])])
    return dataclasses.replace(other, rows=jax.tree.map(lambda array: array[order], other.rows))


def target_states(
    model: Model, virtual: VirtualPrompt | None, prefix: Prefix | None, rows: Rows
) -> Float[Array, "M B D"]:
    """Returns the hidden states that predict the targets, with the targets of a row first.

    Args:
      model: the base.
      virtual: the soft prompt; None for none.
      prefix: the memory before the rows, from `encode_prefix`.
      rows: the rows.
    """
    outputs = output_states(model, virtual, prefix, rows)
    return jnp.swapaxes(jnp.take_along_axis(outputs, rows.target_outputs[:, :, None], axis=1), 0, 1)


@jax.jit
def _batch_divergence(model: Model, virtual: VirtualPrompt, soft: Batch, bare: Batch) -> Float[Array, " B"]:
    """Returns the sum of the divergences of each row. One target of each row at a time has all its logits."""

    def states(virtual: VirtualPrompt | None, batch: Batch) -> Float[Array, "M B D"]:
        prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
        return target_states(model, virtual, prefix, batch.rows)

    def of_target(own: tuple[Float[Array, "B D"], Float[Array, "B D"]]) -> Float[Array, " B"]:
        log_p, log_q = (jax.nn.log_softmax(model.logits(hidden), axis=-1) for hidden in own)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    values = jax.lax.map(of_target, (states(virtual, soft), states(None, bare)))
    return jnp.sum(jnp.where(soft.rows.target_weights > 0, values.T, 0.0), axis=-1)


def token_log_probabilities(
    base: FrozenBase, bare: Sequence[Example], plan: BatchPlan
) -> list[list[Float[np.ndarray, " N"]]]:
    """Returns the log-probability of each token of each choice under the bare base.

    Args:
      base: the frozen base.
      bare: the result of `bare_examples`.
      plan: that of `bare_plan`, for these examples or for longer ones.
    """
    batch = pack(bare, plan)
    values = to_host(_token_scores(base.model, place_batch(batch, base.mesh)))
    found: dict[int, list[Float[np.ndarray, " N"]]] = {}
    for row, slot in zip(*np.nonzero(batch.rows.examples >= 0), strict=True):
        groups, real = batch.rows.target_groups[row], batch.rows.target_weights[row] > 0
        first = slot * plan.choices
        own = [values[row, real & (groups == first + choice)] for choice in range(plan.choices)]
        found[int(batch.rows.examples[row, slot])] = own
    return [found[number] for number in range(len(bare))]


@jax.jit
def _token_scores(model: Model, batch: Batch) -> Float[Array, "B M"]:
    prefix = encode_prefix(model, None, batch.lead_ids, batch.lead_length)
    return target_scores(model, None, prefix, batch.rows).log_probabilities[:, :, 0]
