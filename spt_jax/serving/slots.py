"""The compiled half of serving: cache slots that requests come into and leave, and one decode step for all of them.

    a prompt's keys and values --+
    a request's own ids ---------+--admit--> its slot --decode--> a token per slot and step, whatever prompt each has

A slot holds the keys and values of its prompt, then of the request, then of new tokens; positions say where each
stands, and segment 0 marks what holds nothing. Pure functions that take the frozen parameters as an argument.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spt_jax.base import logits
from spt_jax.decoding import RowSampling, next_tokens
from spt_jax.forward import run_stream
from spt_jax.models.attention import NEVER, Cache, Prefix, Stream, to_cache
from spt_jax.models.decoder import Decoder
from spt_jax.models.hf import Params
from spt_jax.prompts.virtual import VirtualPrompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Requests under way, one per slot.

    cache: keys and values of each slot's tokens so far.
    filled: the entry of its cache that a slot fills next.
    ids: the id that a slot runs next, and where it stands (positions).
    steps: how many tokens a slot has got.
    sampling: of each slot's request.
    """

    cache: Cache
    filled: Int[Array, " B"]
    ids: Int[Array, " B"]
    positions: Int[Array, " B"]
    steps: Int[Array, " B"]
    sampling: RowSampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RequestIds:
    """A request's ids behind what its prompt's prefix holds.

    ids: right-padded; length: how many of them are real, at least 1.
    start: the position of the first.
    """

    ids: Int[Array, " T"]
    length: Int[Array, ""]
    start: Int[Array, ""]


def empty_slots(module: Decoder, dtype: jnp.dtype, count: int, capacity: int) -> Slots:
    """Slots of which none holds a request, with room for so many positions in each."""
    config = module.config
    empty = jnp.zeros((config.layers, count, capacity, config.kv_heads, config.head_size), dtype)
    places = jnp.zeros((count, capacity), jnp.int32)
    cache = Cache(*to_cache(empty, empty), places, places)
    none = jnp.zeros(count, jnp.int32)
    sampling = RowSampling(jnp.zeros(count), none, jnp.ones(count), none.astype(jnp.uint32), none)
    return Slots(cache, none, none, none, none, sampling)


def admit(
    module: Decoder,
    frozen: Params,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    request: RequestIds,
    sampling: RowSampling,
    slot: Int[Array, ""],
    slots: Slots,
) -> tuple[Slots, Int[Array, ""], Float[Array, ""]]:
    """Runs a request's own ids behind its prompt's prefix, puts both into a slot, and chooses the first token.

    Args:
      virtual: rows for virtual ids among the request's.
      prefix: the prompt's keys and values, of which those at NEVER are padding.
      sampling: the request's, scalars.
      slot: which.

    Returns:
      The slots, the first token and its log-probability.
    """
    length = request.ids.shape[0]
    places = jnp.arange(length, dtype=jnp.int32)
    real = (places < request.length).astype(jnp.int32)
    positions = request.start + places
    stream = Stream(positions[None], real[None], jnp.zeros_like(positions)[None])
    hidden, (keys, values) = run_stream(
        module, frozen, virtual, request.ids[None], stream, prefix, return_keys_values=True
    )
    last = jax.lax.dynamic_index_in_dim(hidden[0], request.length - 1, keepdims=True)
    first, found = next_tokens(logits(module, frozen, last), jnp.int32(0), sampling)
    capacity = slots.cache.positions.shape[1]
    parts = [(keys, values, positions, real)]
    if prefix is not None:
        held = (prefix.positions != NEVER).astype(jnp.int32)
        at = jnp.where(held > 0, prefix.positions, 0)
        parts.insert(0, (prefix.keys[:, None].astype(keys.dtype), prefix.values[:, None].astype(keys.dtype), at, held))
    keys, values = to_cache(*(jnp.concatenate([part[i] for part in parts], axis=2) for i in (0, 1)))
    positions, segments = (jnp.concatenate([part[i] for part in parts]) for i in (2, 3))
    taken = positions.shape[0]
    put = jax.lax.dynamic_update_slice
    cache = slots.cache

    def row(values: Int[Array, " P"]) -> Int[Array, "1 C"]:
        return jnp.pad(values, (0, capacity - taken))[None]

    cache = Cache(
        put(cache.keys, keys, (0, slot, 0, 0, 0)),
        put(cache.values, values, (0, slot, 0, 0, 0)),
        put(cache.positions, row(positions), (slot, 0)),
        put(cache.segments, row(segments), (slot, 0)),
    )
    slots = Slots(
        cache,
        slots.filled.at[slot].set(taken - length + request.length),  # new tokens take the padding's place
        slots.ids.at[slot].set(first[0]),
        slots.positions.at[slot].set(request.start + request.length),
        slots.steps.at[slot].set(1),
        jax.tree.map(lambda all_slots, own: all_slots.at[slot].set(own), slots.sampling, sampling),
    )
    return slots, first[0], found[0]


def decode(
    module: Decoder, count: int, reach: int, frozen: Params, busy: Bool[Array, " B"], slots: Slots
) -> tuple[Slots, Int[Array, "N B"], Float[Array, "N B"]]:
    """Chooses N = `count` tokens for every slot. What slots that are not busy get means nothing.

    Only the first `reach` entries of the slots are read: those of busy slots are all among them, new ones included.

    Returns:
      The slots, the new ids, and their log-probabilities under the model's own distribution.
    """
    numbers = jnp.arange(slots.ids.shape[0])

    def advance(slots: Slots, _: None) -> tuple[Slots, tuple[Array, Array]]:
        own = jnp.ones_like(slots.ids)[:, None]
        stream = Stream(slots.positions[:, None], own, jnp.zeros_like(own))
        cache = slots.cache
        near = dataclasses.replace(cache, positions=cache.positions[:, :reach], segments=cache.segments[:, :reach])
        hidden, (keys, values) = run_stream(
            module, frozen, None, slots.ids[:, None], stream, None, near, return_keys_values=True
        )
        chosen, found = next_tokens(logits(module, frozen, hidden[:, 0]), slots.steps, slots.sampling)
        at = jnp.minimum(slots.filled, reach - 1)
        cache = Cache(
            cache.keys.at[:, numbers, :, :, at].set(jnp.swapaxes(keys[:, :, 0], 0, 1)),
            cache.values.at[:, numbers, :, at].set(jnp.swapaxes(values[:, :, 0], 0, 1)),
            cache.positions.at[numbers, at].set(slots.positions),
            cache.segments.at[numbers, at].set(busy.astype(jnp.int32)),
        )
        moved = Slots(cache, slots.filled + 1, chosen, slots.positions + 1, slots.steps + 1, slots.sampling)
        return moved, (chosen, found)

    slots, (ids, log_probabilities) = jax.lax.scan(advance, slots, None, length=count)
    return slots, ids, log_probabilities
