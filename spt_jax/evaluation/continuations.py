"""Log-probabilities of given continuations, and whether greedy decoding would choose them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, multiples, place_batch, plan_batches, shared_length
from spt_jax.data.examples import Example
from spt_jax.data.streams import evaluation_batches
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.forward import encode_prefix, output_states
from spt_jax.inference.generation import check_ids
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import to_host

# Targets per row whose logits are in memory at once.
TOGETHER = 16


@dataclasses.dataclass(frozen=True)
class ContinuationScore:
    """The score of one continuation.

    Attributes:
      log_probability: the sum over its tokens, each given all tokens before it.
      is_greedy: whether each of its tokens is the likeliest one.
    """

    log_probability: float
    is_greedy: bool


def score_continuations(
    base: FrozenBase,
    pairs: Sequence[tuple[Sequence[int] | Int[np.ndarray, " _"], Sequence[int] | Int[np.ndarray, " _"]]],
    virtual: VirtualPrompt | None = None,
    *,
    batch_size: int = 32,
) -> list[ContinuationScore]:
    """Scores continuations, in batches of packed rows. What all contexts begin with is run once per batch.

    Args:
      base: the frozen base.
      pairs: for each continuation, the ids of its context, which may include virtual ones (`vocab_size + i`), and its
        own ids; neither may be empty.
      virtual: the soft prompt.
      batch_size: continuations per batch. Apart from rounding, results do not depend on it.

    Returns:
      The scores, in the order of the pairs.

    Raises:
      ConfigError: the base is not causal, the soft prompt has a task head, there are virtual ids without a soft
        prompt, or `batch_size` is below 1.
      DataError: a context or a continuation is empty, the two have more tokens than the base has positions, or an id
        does not exist.
    """
    if not base.layout.causal:
        raise ConfigError(f"{base.name} has an encoder, and continuations are scored with causal bases only")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if virtual is not None and virtual.head is not None:
        raise ConfigError("this soft prompt has a task head in place of the output matrix and cannot score text")
    if not pairs:
        return []
    examples = [_example(*pair, number) for number, pair in enumerate(pairs)]
    per_input = virtual is not None and virtual.instance is not None
    examples = [example.reading(causal=True) for example in examples] if per_input else examples
    prefix = 0 if virtual is None else virtual.prefix_length
    rows = None if virtual is None else 0 if virtual.tokens is None else len(virtual.tokens)
    for example in examples:
        name, most = f"continuation {example.index} with its context", base.layout.max_positions
        check_ids(base, example.ids, rows, name)
        if prefix + len(example.ids) - 1 > most:  # the last token is predicted, and not read
            raise DataError(
                f"{name} has {len(example.ids)} tokens, and the soft prompt's prefix {prefix}; {base.name} has {most}"
                " positions"
            )
    plan = plan_batches(
        examples,
        # The last id of a context, which predicts, stays in the rows.
        lead=0
        if per_input
        else shared_length([example.ids for example in examples], min(e.first_target for e in examples) - 1),
        batch_size=batch_size,
        packing=base.layout.packs,
        max_length=base.layout.max_positions,
        **multiples(base.mesh),
    )
    # All batches are dispatched before the first is waited for.
    pending = [
        (batch.rows, _target_results(base.model, virtual, place_batch(batch, base.mesh)))
        for batch in evaluation_batches(examples, plan, batch_size)
    ]
    sums, greedy = np.zeros(len(examples)), np.ones(len(examples), bool)
    for rows, results in pending:
        values, likeliest = map(to_host, results)
        row, target = np.nonzero(rows.target_weights > 0)
        owners = rows.examples[row, rows.target_groups[row, target]]
        np.add.at(sums, owners, values[row, target].astype(float))
        np.logical_and.at(greedy, owners, likeliest[row, target])
    return [ContinuationScore(*own) for own in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _example(
    context: Sequence[int] | Int[np.ndarray, " _"], continuation: Sequence[int] | Int[np.ndarray, " _"], number: int
) -> Example:
    ids = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation, np.int32)])
    return Example(ids, np.arange(len(ids)) >= len(context), (), 0, number)


@jax.jit
def _target_results(
    model: Model, virtual: VirtualPrompt | None, batch: Batch
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """Returns the log-probability of each target, and whether it is the likeliest token."""
    rows = batch.rows
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    states = output_states(model, virtual, prefix, rows)
    places = jnp.pad(rows.target_outputs, ((0, 0), (0, -rows.target_outputs.shape[1] % TOGETHER)))
    ids = jnp.pad(rows.target_ids, ((0, 0), (0, -rows.target_ids.shape[1] % TOGETHER)))

    def part(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        at, targets = inputs
        logits = model.logits(jnp.take_along_axis(states, at[:, :, None], axis=1))
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=2)[:, :, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    parts = tuple(jnp.moveaxis(array.reshape(len(array), -1, TOGETHER), 1, 0) for array in (places, ids))
    values, greedy = (jnp.moveaxis(array, 0, 1).reshape(ids.shape) for array in jax.lax.map(part, parts))
    count = rows.target_ids.shape[1]
    return values[:, :count], greedy[:, :count]
