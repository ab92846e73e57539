"""Prompt lookup decoding: several tokens per pass of the base, where an answer repeats earlier text.

    request and answer so far --draft--> up to K ids that may follow --verify--> 1 to K + 1 tokens of the answer

A draft continues the latest earlier occurrence of the last ids (Saxena 2023, "Prompt Lookup Decoding"). One pass runs a
slot's next id and its draft. Each position then chooses a token with the random numbers of its own step, as `decode`
does, and drafts are kept up to the first that differs from the token chosen. The answer therefore does not depend on
the drafts, apart from the rounding of a pass over several tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from spt_jax.errors import ConfigError
from spt_jax.inference.decoding import RowSampling, likeliest, next_tokens
from spt_jax.inference.forward import run_stream
from spt_jax.models import memory
from spt_jax.models.attention import Cache, Prefix, Stream
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.serving.requests import Ticket
from spt_jax.serving.slots import NewTokens, Slots

# How many last ids must occur earlier, the first that do being used, and the most ids of a draft.
MATCHED = (3, 2)
MAX_DRAFT = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """The drafts of all slots.

    Attributes:
      ids: the ids that may follow each slot's next id, right-padded.
      lengths: the number of ids in each draft; 0 for none.
    """

    ids: Int[Array, "B K"]
    lengths: Int[Array, " B"]


def check_draft_size(most: int) -> None:
    """Checks a number of ids per draft, as far as it does not depend on the base.

    Args:
      most: the number; 0 for no drafts.

    Raises:
      ConfigError: the number is out of range.
    """
    if not 0 <= most <= MAX_DRAFT:
        raise ConfigError(f"lookup is {most}; it must be between 0 and {MAX_DRAFT}")


def check_lookup(layout: Layout, name: str, most: int) -> None:
    """Checks that a base can decode with drafts of up to `most` ids.

    Args:
      layout: the layout of the base.
      name: the name of the base.
      most: the number of ids per draft; 0 for no drafts.

    Raises:
      ConfigError: `most` is out of range, or the base is an encoder-decoder or has recurrent layers, whose states
        cannot go back to the last token that was kept.
    """
    check_draft_size(most)
    if most and layout.state_groups:
        raise ConfigError(f"lookup is {most}, but {name} has recurrent layers, which cannot undo drafts; use 0")
    if most and (layout.encodes or not layout.generates):
        raise ConfigError(f"lookup is {most}, but {name} is not a decoder-only base; use 0")


def draft(ids: Sequence[int] | np.ndarray, most: int) -> np.ndarray:
    """Returns the ids that followed the latest earlier occurrence of the last ids.

    Args:
      ids: the ids so far.
      most: the number of ids to return, if there is an occurrence.

    Returns:
      The ids; none if the last ids do not occur earlier. Where an occurrence overlaps the end, its period continues.
    """
    known = np.asarray(ids, np.int32)
    for size in MATCHED:
        if len(known) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(known[:-1], size)
        (starts,) = np.nonzero((windows == known[-size:]).all(axis=1))
        if len(starts):
            first = int(starts[-1]) + size
            return known[first + np.arange(most) % (len(known) - first)]
    return known[:0]


def drafts_of(tickets: Sequence[Ticket | None], most: int, vocab_size: int) -> Drafts | None:
    """Returns the drafts for the requests in the slots.

    Args:
      tickets: the request in each slot; None for a free slot.
      most: the number of ids per draft.
      vocab_size: the number of real ids; a draft ends before a virtual id.

    Returns:
      NumPy arrays; None if there are no drafts.
    """
    ids, lengths = np.zeros((len(tickets), most), np.int32), np.zeros(len(tickets), np.int32)
    for slot, ticket in enumerate(tickets):
        # The pass chooses one token more than the draft has.
        room = 0 if ticket is None else ticket.request.sampling.max_new_tokens - len(ticket.ids) - 1
        if ticket is None or room < 1 or not most:
            continue
        own = draft(np.concatenate([ticket.request.ids, np.asarray(ticket.ids, np.int32)]), min(room, most))
        real = np.cumprod(own < vocab_size, dtype=np.int32).sum()
        ids[slot, :real], lengths[slot] = own[:real], real
    arrays: Any = ids, lengths
    return Drafts(*arrays) if lengths.any() else None


def verify(
    reach: int,
    model: Model,
    busy: Bool[Array, " B"],
    wanted: Bool[Array, ""],
    drafts: Drafts,
    shared: Prefix | None,
    slots: Slots,
) -> tuple[Slots, NewTokens, Int[Array, " B"]]:
    """Generates one token for each slot, and more as long as its draft agrees with them.

    Args:
      reach: the number of cache entries per slot to read; it must cover all entries of busy slots, those of their
        drafts included.
      model: the base, decoder-only and without recurrent layers.
      busy: whether each slot has a request. Free slots stay as they are.
      wanted: whether to find the likeliest tokens.
      drafts: the drafts.
      shared: the shared entries; None if no busy slot has a parent.
      slots: the current slots.

    Returns:
      The new slots; tokens with N = K + 1; how many of each slot's tokens are real, at least 1.
    """
    batch, most = drafts.ids.shape
    numbers, steps = jnp.arange(batch)[:, None], jnp.arange(most + 1)[None]
    ids = jnp.concatenate([slots.ids[:, None], drafts.ids], axis=1)
    positions = slots.positions[:, None] + steps
    real = steps <= drafts.lengths[:, None]
    stream = Stream(positions, real.astype(jnp.int32), jnp.broadcast_to(slots.parents[:, None], ids.shape))
    cache = slots.cache
    near = Cache(
        cache.memory,
        cache.positions[:, :reach],
        cache.segments[:, :reach],
        None if cache.pinned is None else cache.pinned[:, :reach],
    )
    hidden, found = run_stream(model, None, ids, stream, shared, near, return_memory=True)

    def of_tokens(array: Array) -> Array:
        return jnp.repeat(array, most + 1, axis=0)

    scores = model.logits(hidden.reshape(batch * (most + 1), -1))
    own = slots.sampling
    sampling = RowSampling(*map(of_tokens, (own.temperature, own.top_k, own.top_p, own.seed, own.numbers)))
    chosen = next_tokens(scores, (slots.steps[:, None] + steps).reshape(-1), sampling)
    new = jax.tree.map(
        lambda array: jnp.swapaxes(array.reshape(batch, most + 1, *array.shape[1:]), 0, 1),
        NewTokens(*chosen, likeliest(scores, wanted)),
    )
    agree = (drafts.ids == new.ids[:-1].T) & real[:, 1:]
    taken = 1 + jnp.sum(jnp.cumprod(agree, axis=1), axis=1)
    # Places past the end are dropped: those of padding, and of free slots.
    places = jnp.where(real & busy[:, None], slots.filled[:, None] + steps, cache.positions.shape[1])
    cache = Cache(
        {**cache.memory, **memory.put_runs(cache.memory, memory.finite(found), places)},
        cache.positions.at[numbers, places].set(positions, mode="drop"),
        # Rejected drafts are empty entries, which the next tokens fill.
        cache.segments.at[numbers, places].set((steps < taken[:, None]).astype(jnp.int32), mode="drop"),
        None if cache.pinned is None else cache.pinned.at[numbers, places].set(False, mode="drop"),
    )
    moved = jnp.where(busy, taken, 0)
    last = jnp.take_along_axis(new.ids, taken[None] - 1, axis=0)[0]
    nexts = jnp.where(busy, last, slots.ids)
    counts = slots.filled + moved, nexts, slots.positions + moved, slots.steps + moved
    slots = Slots(cache, *counts, slots.sampling, slots.parents)
    return slots, new, taken
