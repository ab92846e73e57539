"""Chunked prefill: the ids of a long request run in several calls, so that other requests are decoded in between.

    first ids --admit--> slot --extend--> the next N ids after what the slot holds --extend--> ... --> first token

The first call gets the remainder, so that each later one has exactly N ids and needs no padding. The reach of a call,
the number of entries that it reads of the slot, is one of a few, so that few programs serve all lengths.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from spt_jax.errors import ConfigError
from spt_jax.inference.decoding import RowSampling, likeliest, next_tokens
from spt_jax.inference.forward import pinned_ids, run_stream
from spt_jax.models import memory
from spt_jax.models.attention import Cache, Prefix, Stream
from spt_jax.models.layout import Layout
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.serving.slots import NewTokens, Slots

# Bounds of N. Shorter chunks cost more than they save: each reads all weights of the base.
MIN_CHUNK = 16
DEFAULT_CHUNK = 256
# The shortest reach, in chunks, and the factor from one to the next, so that there are few programs.
_GROWTH = 4


def check_chunk(chunk: int | None) -> None:
    """Checks a number of ids per chunk, as far as it does not depend on the base.

    Args:
      chunk: the number that was asked for; None for the default of the base.

    Raises:
      ConfigError: the number is out of range.
    """
    if chunk and chunk < MIN_CHUNK:
        raise ConfigError(f"chunk is {chunk}; it must be at least {MIN_CHUNK}, or 0 to run each request in one call")


def chunk_of(layout: Layout, name: str, chunk: int | None) -> int:
    """Returns the number of ids per chunk; 0 if requests run in one call.

    Args:
      layout: the layout of the base.
      name: the name of the base.
      chunk: the number that was asked for; None for the default of the base.

    Raises:
      ConfigError: the number is out of range, or the base is an encoder-decoder, whose encoder reads each request as
        a whole.
    """
    check_chunk(chunk)
    if chunk is None:
        return 0 if layout.encodes else DEFAULT_CHUNK
    if chunk and layout.encodes:
        raise ConfigError(f"chunk is {chunk}, but the encoder of {name} reads each request as a whole; use 0")
    return chunk


def first_count(count: int, chunk: int) -> int:
    """Returns how many of `count` ids the first call runs."""
    return (count - 1) % chunk + 1 if chunk else count


def reach_of(entries: int, chunk: int, capacity: int) -> int:
    """Returns the number of cache entries that a call of `extend` reads.

    Args:
      entries: the number of entries that the slot has.
      chunk: the number of ids of the call.
      capacity: the number of entries that a slot can have.
    """
    reach = _GROWTH * chunk
    while reach < entries:
        reach *= _GROWTH
    return min(reach, capacity)


def extend(
    reach: int,
    model: Model,
    virtual: VirtualPrompt | None,
    ids: Int[Array, " T"],
    at: Int[Array, ""],
    wanted: Bool[Array, ""],
    shared: Prefix | None,
    slots: Slots,
) -> tuple[Slots, NewTokens]:
    """Runs the next ids of a request after what its slot holds, and chooses the token after them.

    Args:
      reach: the number of cache entries of the slot to read; it must cover all that are filled.
      model: the base, not an encoder-decoder.
      virtual: the rows for the virtual ids of the request.
      ids: the ids; the slot must have room for T more entries.
      at: the slot, which `admit` has filled with what precedes the ids.
      wanted: whether to find the likeliest tokens.
      shared: the memory of the prompt that the request follows, if the slot does not have it.
      slots: the current slots.

    Returns:
      The new slots, and the token, which is the request's first if the ids are its last.
    """

    def of_slot(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, at, 1)

    def put(array: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(array, new, (at, filled))

    cache, count = slots.cache, ids.shape[0]
    filled, start = slots.filled[at], slots.positions[at]
    rows = ids[None]
    positions, real = (start + jnp.arange(count, dtype=jnp.int32))[None], jnp.ones_like(rows)
    pinned = pinned_ids(model, virtual, rows)
    pinned = jnp.zeros(rows.shape, bool) if pinned is None else pinned
    before = Cache(
        memory.take_row(cache.memory, at, reach),
        of_slot(cache.positions)[:, :reach],
        of_slot(cache.segments)[:, :reach],
        None if cache.pinned is None else of_slot(cache.pinned)[:, :reach],
    )
    stream = Stream(positions, real, jnp.zeros_like(rows))
    hidden, found = run_stream(model, virtual, rows, stream, shared, before, return_memory=True)
    own = memory.to_cache(memory.finite(memory.cast(found, model.dtype)))
    cache = Cache(
        memory.put_row(cache.memory, own, at, filled),
        put(cache.positions, positions),
        put(cache.segments, real),
        None if cache.pinned is None else put(cache.pinned, pinned),
    )
    scores = model.logits(hidden[:, -1])
    sampling: RowSampling = jax.tree.map(of_slot, slots.sampling)
    first = NewTokens(*next_tokens(scores, jnp.int32(0), sampling), likeliest(scores, wanted))
    slots = Slots(
        cache,
        slots.filled.at[at].add(count),
        slots.ids.at[at].set(first.ids[0]),
        slots.positions.at[at].add(count),
        slots.steps,
        slots.sampling,
        slots.parents,
    )
    return slots, first
