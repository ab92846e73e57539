"""The compiled functions of serving: `admit` puts requests into cache slots, `decode` generates for all slots at once.

    a prompt's memory -----+
    a request's own ids ---+--admit--> its slot --decode--> a token per slot and step, for any mixture of prompts

A slot's cache has the memory of its prompt, then of the request, then of new tokens, with their positions; entries of
segment 0 are empty. The memory of a long prompt may be in entries that all slots read instead (`shared`). `two_sides`
says what it has for an encoder-decoder. The functions are pure and take the frozen parameters as an argument.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.inference.decoding import ALTERNATIVES, RowSampling, likeliest, next_tokens, with_forced
from spt_jax.inference.forward import pinned_ids, run_stream
from spt_jax.inference.two_sides import both_sides
from spt_jax.models import memory
from spt_jax.models.attention import NEVER, Cache, Prefix, Stream
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.serving.two_sides import crossed, nearest, put_requests, stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The running requests, one per slot.

    Attributes:
      cache: the memory of each slot's tokens so far.
      filled: the index of the cache entry that each slot fills next; in an encoder-decoder, among the decoder's.
      ids: the id that each slot runs next.
      positions: the position of that id.
      steps: the number of tokens generated in each slot.
      sampling: the sampling parameters of each slot's request.
      parents: the segment of the shared entries that each slot's tokens follow; 0 for none.
    """

    cache: Cache
    filled: Int[Array, " B"]
    ids: Int[Array, " B"]
    positions: Int[Array, " B"]
    steps: Int[Array, " B"]
    sampling: RowSampling
    parents: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The tokens that one or more steps have chosen.

    Attributes:
      ids: the token ids.
      log_probabilities: under the model's distribution, before sampling parameters are applied.
      likeliest: the likeliest ids, in descending order, and their log-probabilities, if any request wants them.
    """

    ids: Int[Array, "*N B"]
    log_probabilities: Float[Array, "*N B"]
    likeliest: tuple[Int[Array, "*N B A"], Float[Array, "*N B A"]]


# The most steps of one call of `decode`, and the fewest before it returns because requests have ended.
MAX_STEPS, MIN_STEPS = 16, 4
# The most different end ids that a call of `decode` detects.
MAX_ENDS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Until:
    """When a call of `decode` returns: at the first of two conditions.

    Attributes:
      steps: this number of steps, at most MAX_STEPS, has been taken.
      ends: this number of busy slots have reached an end id, and at least MIN_STEPS steps have been taken.
      end_ids: the end ids of all slots.
    """

    steps: Int[Array, ""]
    ends: Int[Array, ""]
    end_ids: Int[Array, " E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestIds:
    """The ids of requests that follow their prompts' prefixes.

    Attributes:
      ids: the ids, right-padded.
      lengths: the number of real ids of each request, at least 1.
      starts: the position of each request's first id.
      parents: the segment of the shared entries that each request's tokens follow; 0 for none.
      decoder: of an encoder-decoder, the indices of the ids that its decoder reads, which are the last ones, with T for
        padding; None for other bases.
    """

    ids: Int[Array, "N T"]
    lengths: Int[Array, " N"]
    starts: Int[Array, " N"]
    parents: Int[Array, " N"]
    decoder: Int[Array, "N U"] | None = None


def empty_slots(model: Model, count: int, capacity: int) -> Slots:
    """Returns `count` empty slots with `capacity` cache entries each, in an encoder-decoder at each of two sites."""
    names = list(model.layout.cached_groups)
    entries = count, capacity * (2 if model.layout.encodes else 1)
    places = jnp.zeros(entries, jnp.int32)
    pinned = jnp.zeros(entries, bool) if model.layout.windowed else None
    cache = Cache(memory.empty_cache(model.layout, count, capacity, model.dtype, names), places, places, pinned)
    none = jnp.zeros(count, jnp.int32)
    sampling = RowSampling(jnp.zeros(count), none, jnp.ones(count), none.astype(jnp.uint32), none)
    return Slots(cache, none, none, none, none, sampling, none)


def admit(
    model: Model,
    prompts: Sequence[tuple[VirtualPrompt | None, Prefix | None]],
    shared: Prefix | None,
    requests: RequestIds,
    sampling: RowSampling,
    at: Int[Array, " N"],
    wanted: Bool[Array, ""],
    slots: Slots,
) -> tuple[Slots, NewTokens]:
    """Runs N requests' ids after their prompts' memory, stores both in slots, and chooses the first tokens.

    Args:
      model: the base.
      prompts: for each request, the rows for its virtual ids, and the prompt's memory, padded at position NEVER. All
        requests must have the same shapes.
      shared: the memory of the one prompt that all requests follow, which is not stored in the slots; None for that of
        `prompts`.
      requests: the requests' ids.
      sampling: the requests' sampling parameters.
      at: the slots to use.
      wanted: whether to find the likeliest tokens.
      slots: the current slots.

    Returns:
      The new slots and the first tokens.
    """
    count, length = requests.ids.shape
    places = jnp.arange(length, dtype=jnp.int32)[None]
    real = (places < requests.lengths[:, None]).astype(jnp.int32)
    positions = requests.starts[:, None] + places
    numbers = jnp.arange(count)
    if shared is None:
        virtual, index = jax.tree.map(lambda *own: jnp.stack(own), *(virtual for virtual, _ in prompts)), numbers
    else:  # All have the same prompt.
        virtual, index = prompts[0][0], None
    stream = Stream(positions, real, jnp.zeros_like(positions), index)
    cache = dataclasses.replace(slots.cache, segments=slots.cache.segments.at[at].set(0))
    prefixes = [prefix for _, prefix in prompts if prefix is not None]
    if requests.decoder is not None:
        prefix = stacked(prefixes)
        stream = both_sides(stream, requests.decoder, requests.starts[:, None])
        stream = dataclasses.replace(stream, pinned=pinned_ids(model, virtual, requests.ids, index))
        hidden, found = run_stream(model, virtual, requests.ids, stream, prefix, return_memory=True)
        if prefix is not None:
            prefix = dataclasses.replace(prefix, memory=_finite(model, prefix.memory))
        cache, filled = put_requests(cache, at, prefix, _finite(model, found), stream)
        own_length = jnp.sum(requests.decoder < length, axis=1)
        # New tokens take the padding's place.
        filled, nexts = filled - requests.decoder.shape[1] + own_length, requests.starts + own_length
    else:
        lead = _side_by_side(prefixes)
        hidden, found = run_stream(model, virtual, requests.ids, stream, shared, lead, return_memory=True)
        pinned = pinned_ids(model, virtual, requests.ids, index)
        own = Cache(memory.to_cache(found), positions, real, pinned)
        cache, taken = _put(model, cache, at, [own] if lead is None else [lead, own])
        # New tokens take the padding's place.
        filled, nexts = taken - length + requests.lengths, requests.starts + requests.lengths
    scores = with_forced(model.layout, model.logits(hidden[numbers, requests.lengths - 1]), jnp.int32(0))
    firsts = NewTokens(*next_tokens(scores, jnp.int32(0), sampling), likeliest(scores, wanted))
    slots = Slots(
        cache,
        slots.filled.at[at].set(filled),
        slots.ids.at[at].set(firsts.ids),
        slots.positions.at[at].set(nexts),
        slots.steps.at[at].set(1),
        jax.tree.map(lambda all_slots, own: all_slots.at[at].set(own), slots.sampling, sampling),
        slots.parents.at[at].set(requests.parents),
    )
    return slots, firsts


def _put(model: Model, cache: Cache, at: Int[Array, " N"], parts: Sequence[Cache]) -> tuple[Cache, int]:
    """Stores caches of requests one after another in slots; returns the cache, and the number of filled entries."""
    taken = 0
    for part in parts:
        own = slice(taken, taken := taken + part.positions.shape[1])
        pins = cache.pinned
        if pins is not None:
            pins = pins.at[at, own].set(False if part.pinned is None else part.pinned)
        cache = Cache(
            memory.put_rows(cache.memory, _finite(model, part.memory), at, own),
            cache.positions.at[at, own].set(part.positions),
            cache.segments.at[at, own].set(part.segments),
            pins,
        )
    return cache, taken


def _finite(model: Model, own: memory.Memory) -> memory.Memory:
    return memory.finite(memory.cast(own, model.dtype))


def _side_by_side(prefixes: Sequence[Prefix]) -> Cache | None:
    """Stacks the prefixes of several rows into a cache; None if there are none."""
    if not prefixes:
        return None
    rows = memory.stack_rows([prefix.memory for prefix in prefixes])
    positions = jnp.stack([prefix.positions for prefix in prefixes])
    held = positions != NEVER
    pins = [prefix.pinned for prefix in prefixes if prefix.pinned is not None]
    pinned = jnp.stack(pins) if pins else None
    return Cache(memory.to_cache(rows), jnp.where(held, positions, 0), held.astype(jnp.int32), pinned)


def decode(
    reach: int,
    model: Model,
    busy: Bool[Array, " B"],
    wanted: Bool[Array, ""],
    until: Until,
    shared: Prefix | None,
    slots: Slots,
) -> tuple[Slots, NewTokens, Int[Array, ""]]:
    """Generates tokens for busy slots, step by step. Other slots stay as they are; their tokens have no meaning.

    Args:
      reach: the number of cache entries per slot (and site) to read; it must cover all entries of busy slots, new ones
        included.
      model: the base.
      busy: whether each slot has a request that has its first token.
      wanted: whether to find the likeliest tokens.
      until: when to stop.
      shared: the shared entries; None if no busy slot has a parent.
      slots: the current slots.

    Returns:
      The new slots; the new tokens, with N = MAX_STEPS; the number of steps taken.
    """
    batch = slots.ids.shape[0]
    numbers, start = jnp.arange(batch), crossed(slots.cache, model.layout)
    moves = busy.astype(jnp.int32)
    # Entries past the end are not written.
    capacity = slots.cache.positions.shape[1] - start
    found = min(ALTERNATIVES, model.layout.vocab_size)
    room = NewTokens(
        jnp.zeros((MAX_STEPS, batch), jnp.int32),
        jnp.zeros((MAX_STEPS, batch)),
        (jnp.zeros((MAX_STEPS, batch, found), jnp.int32), jnp.zeros((MAX_STEPS, batch, found))),
    )

    def unfinished(state: tuple[Slots, NewTokens, Array, Array]) -> Bool[Array, ""]:
        _, _, step, ended = state
        return (step < until.steps) & ((step < MIN_STEPS) | (jnp.sum(ended) < until.ends))

    def advance(state: tuple[Slots, NewTokens, Array, Array]) -> tuple[Slots, NewTokens, Array, Array]:
        slots, chosen, step, ended = state
        own = moves[:, None]  # Padding leaves recurrent states as they are.
        stream = Stream(slots.positions[:, None], own, slots.parents[:, None])
        if model.layout.encodes:
            stream = dataclasses.replace(stream, decoder=jnp.zeros_like(own))
        cache = slots.cache
        near = nearest(cache, start, reach)
        hidden, own_memory = run_stream(model, None, slots.ids[:, None], stream, shared, near, return_memory=True)
        scores = model.logits(hidden[:, 0])
        new = NewTokens(*next_tokens(scores, slots.steps, slots.sampling), likeliest(scores, wanted))
        at = jnp.where(busy, slots.filled, capacity)
        cache = Cache(
            {**cache.memory, **memory.put_each(cache.memory, memory.finite(own_memory), at)},
            cache.positions.at[numbers, start + at].set(slots.positions),
            cache.segments.at[numbers, start + at].set(moves),
            None if cache.pinned is None else cache.pinned.at[numbers, start + at].set(False),
        )
        ids = jnp.where(busy, new.ids, slots.ids)
        counts = slots.filled + moves, slots.positions + moves, slots.steps + moves
        moved = Slots(cache, counts[0], ids, counts[1], counts[2], slots.sampling, slots.parents)
        chosen = jax.tree.map(lambda all_steps, own: all_steps.at[step].set(own), chosen, new)
        return moved, chosen, step + 1, ended | (busy & jnp.any(new.ids[:, None] == until.end_ids[None], axis=1))

    state = slots, room, jnp.int32(0), jnp.zeros(batch, bool)
    slots, chosen, steps, _ = jax.lax.while_loop(unfinished, advance, state)
    return slots, chosen, steps
