"""The compiled part of generation: a prefix shared by all rows, a static cache, and a loop that decodes with both.

    lead ids, the same for all --encode_lead--> Prefix --+---> decode: one token per row and step, until all have ended
    rows, right-padded ----------prefill------> Cache ---+

The functions are pure and take the model as an argument.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from spt_jax.inference.forward import encode_prefix, pinned_ids, run_stream
from spt_jax.inference.two_sides import both_sides, of_both_sides
from spt_jax.models import memory
from spt_jax.models.attention import Cache, Prefix, Stream
from spt_jax.models.layout import CROSS, SELF, Layout
from spt_jax.models.memory import Memory
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Prompts without the leading ids, which are in the prefix, and without their last id, the first one to decode.

    Attributes:
      ids: the ids, right-padded.
      lengths: how many ids of each row are real; may be 0.
      last: the last id of each prompt.
      starts: the position of each row's first id, after the soft prompt's prefix and the leading ids.
      prompt_index: the index of each row's soft prompt; None if all rows have the same.
      decoder: of an encoder-decoder, the indices of the ids that its decoder reads, with T for padding, U < T; None if
        the first one to decode is also the decoder's first.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    last: Int[Array, " B"]
    starts: Int[Array, " B"]
    prompt_index: Int[Array, " B"] | None = None
    decoder: Int[Array, "B U"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """The traced part of each row's `SamplingConfig`, and each row's number among all prompts."""

    temperature: Float[Array, "*B"]
    top_k: Int[Array, "*B"]
    top_p: Float[Array, "*B"]
    seed: UInt32[Array, "*B"]
    numbers: Int[Array, "*B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the decoding loop.

    Attributes:
      step: the number of tokens generated per row so far.
      ids: the last id of the prompt, followed by the new ids; id `step` is the next input.
      log_probabilities: the log-probabilities of the new ids.
      ended: whether the row has ended.
      cache: slots [0, T) hold the prompts, and slot T + i holds id i. Slots are the same in all rows, whatever the
        tokens' positions, so a step writes a single slice. In an encoder-decoder, slots [0, T) are those of
        cross-attention, and self-attention has U for ids of the prompt before those of the other ids.
    """

    step: Int[Array, ""]
    ids: Int[Array, "B M+1"]
    log_probabilities: Float[Array, "B M"]
    ended: Bool[Array, " B"]
    cache: Cache


def encode_lead(
    model: Model,
    virtual: VirtualPrompt | None,
    lead_ids: Int[Array, "*S P"],
    lead_length: Int[Array, "*S"],
) -> Prefix | None:
    """`encode_prefix` in the base's dtype. Without a gradient, float32 would only mean reading more in each step."""
    prefix = encode_prefix(model, virtual, lead_ids, lead_length)
    if prefix is None:
        return None
    return dataclasses.replace(prefix, memory=memory.cast(prefix.memory, model.dtype))


def prefill(
    model: Model,
    capacity: int,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    rows: PromptRows,
) -> DecodeState:
    """Encodes all prompts without their last ids in one pass, and caches their memory.

    Args:
      model: the base.
      capacity: the maximum number M of new tokens.
      virtual: the soft prompt, if `rows.ids` contain virtual ids.
      prefix: the memory of the preceding ids, shared by all rows.
      rows: the prompts.

    Returns:
      The state before the first new token.
    """
    batch, length = rows.ids.shape
    lengths, starts = rows.lengths[:, None], rows.starts[:, None]
    slots = jnp.arange(length + capacity, dtype=jnp.int32)[None]
    positions = starts + jnp.where(slots < length, slots, lengths + slots - length)
    segments = (slots < lengths).astype(jnp.int32)
    pinned = pinned_ids(model, virtual, rows.ids, rows.prompt_index)
    stream = Stream(
        positions[:, :length],
        segments[:, :length],
        jnp.zeros_like(rows.ids),
        rows.prompt_index,
        pinned=pinned,
    )
    if rows.decoder is not None:
        stream = both_sides(stream, rows.decoder, starts)
    _, found = run_stream(model, virtual, rows.ids, stream, prefix, return_memory=True, return_hidden=False)
    if pinned is not None:
        last = pinned_ids(model, virtual, rows.last[:, None], rows.prompt_index)
        assert last is not None
        pinned = jnp.concatenate([pinned, jnp.pad(last, [(0, 0), (0, capacity - 1)])], axis=1)
    if model.layout.encodes:
        positions, segments, pinned = of_both_sides(stream, starts, segments, pinned)
    return DecodeState(
        step=jnp.zeros((), jnp.int32),
        ids=jnp.pad(rows.last[:, None], [(0, 0), (0, capacity)]),
        log_probabilities=jnp.zeros((batch, capacity), jnp.float32),
        ended=jnp.zeros((batch,), bool),
        cache=Cache(_with_room(model, found, batch, capacity), positions, segments, pinned),
    )


def _with_room(model: Model, found: Memory, rows: int, capacity: int) -> Memory:
    """Returns the memory of the prompts as a cache with room for new tokens."""
    if not model.layout.encodes:
        return memory.to_cache(memory.pad(found, capacity))
    crossed = memory.to_cache({CROSS: found[CROSS]})
    if SELF in found:
        return {**crossed, **memory.to_cache(memory.pad({SELF: found[SELF]}, capacity))}
    return {**crossed, **memory.empty_cache(model.layout, rows, capacity, model.dtype, [SELF])}


def decode(
    model: Model,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    until: Int[Array, ""],
    stopped: Bool[Array, " B"],
    sampling: RowSampling,
    end_ids: Int[Array, "B E"],
    limits: Int[Array, " B"],
    prompt_index: Int[Array, " B"] | None,
    state: DecodeState,
) -> DecodeState:
    """Generates tokens until there are `until` per row, or every row has ended or is `stopped`.

    A row ends with one of its E `end_ids`, or when it reaches its entry of `limits`, a number of tokens.
    """
    put = jax.lax.dynamic_update_slice_in_dim

    def continues(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.ended | stopped)

    def advance(state: DecodeState) -> DecodeState:
        cache = state.cache
        slot = cache.positions.shape[1] - state.log_probabilities.shape[1] + state.step
        ids = jax.lax.dynamic_slice_in_dim(state.ids, state.step, 1, axis=1)
        positions = jax.lax.dynamic_slice_in_dim(cache.positions, slot, 1, axis=1)
        segments = jnp.ones_like(ids)
        stream = Stream(positions, segments, jnp.zeros_like(ids), prompt_index)
        place = slot
        if model.layout.encodes:
            stream = dataclasses.replace(stream, decoder=jnp.zeros_like(ids))
            # The memory of self-attention has no slots for the encoder's tokens.
            place = _entries(cache.memory[SELF]) - state.log_probabilities.shape[1] + state.step
        hidden, new = run_stream(model, virtual, ids, stream, prefix, cache, return_memory=True)
        scores = with_forced(model.layout, model.logits(hidden[:, 0]), state.step)
        chosen, found = next_tokens(scores, state.step, sampling)
        return DecodeState(
            step=state.step + 1,
            ids=put(state.ids, chosen[:, None], state.step + 1, axis=1),
            log_probabilities=put(state.log_probabilities, found[:, None], state.step, axis=1),
            ended=state.ended | jnp.any(chosen[:, None] == end_ids, axis=1) | (state.step + 1 >= limits),
            cache=Cache(
                {**cache.memory, **memory.put(cache.memory, memory.to_cache(new), place)},
                cache.positions,
                put(cache.segments, segments, slot, axis=1),
                cache.pinned,
            ),
        )

    return jax.lax.while_loop(continues, advance, state)


def _entries(pairs: memory.KeysValues | memory.State) -> int:
    assert isinstance(pairs, memory.KeysValues)
    return pairs.keys.shape[-1]


def with_forced(layout: Layout, scores: Float[Array, "B V"], step: Int[Array, "*B"]) -> Float[Array, "B V"]:
    """Returns scores with -inf for all first tokens of an answer except the one that the base forces, if it does.

    Args:
      layout: that of the base.
      scores: the logits of the next token.
      step: the number of tokens of each row's answer so far.
    """
    if layout.forced_id is None:
        return scores
    forced = jnp.arange(scores.shape[1]) == layout.forced_id
    first = jnp.broadcast_to(step, scores.shape[:1]) == 0
    return jnp.where(first[:, None] & ~forced[None], -jnp.inf, scores)


def next_tokens(
    scores: Float[Array, "B V"], step: Int[Array, "*B"], sampling: RowSampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns the next id of each row, and its log-probability under the model's unmodified distribution."""
    chosen = choose(scores, step, sampling)
    return chosen, jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), chosen[:, None], axis=1)[:, 0]


# The maximum number of alternatives that can be requested per step.
ALTERNATIVES = 20


def likeliest(scores: Float[Array, "B V"], wanted: Bool[Array, ""]) -> tuple[Int[Array, "B A"], Float[Array, "B A"]]:
    """Returns the ALTERNATIVES likeliest ids of each row and their log-probabilities, in order; zeros unless wanted."""
    count = min(ALTERNATIVES, scores.shape[1])

    def found() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(jax.nn.log_softmax(scores, axis=-1), count)
        return ids.astype(jnp.int32), values

    def nothing() -> tuple[Array, Array]:
        shape = scores.shape[0], count
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, scores.dtype)

    return jax.lax.cond(wanted, found, nothing)


@jax.named_scope("choose")
def choose(scores: Float[Array, "B V"], step: Int[Array, "*B"], sampling: RowSampling) -> Int[Array, " B"]:
    """Chooses the next id of each row. Random numbers are drawn, and scores sorted, only if the sampling needs it."""
    options = sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.numbers, step
    temperature, top_k, top_p, seeds, numbers, steps = (jnp.broadcast_to(o, scores.shape[:1]) for o in options)

    def greedy() -> Int[Array, " B"]:
        """Takes the first id with the highest score. On CPU, these two reductions take half the time of `argmax`."""
        ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        return jnp.min(jnp.where(scores == highest, ids, scores.shape[1] - 1), axis=-1)

    def sampled() -> Int[Array, " B"]:
        """Samples with the Gumbel-max trick."""
        # The highest score is subtracted first, so that a tiny temperature produces -inf, but never inf.
        shifted = scores - jnp.max(scores, axis=-1, keepdims=True)
        scaled = shifted / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)[:, None]
        noise = jax.vmap(gumbel)(seeds, numbers, steps)
        chosen = jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), among_likeliest, among_all, scaled, noise)
        return jnp.where(temperature > 0, chosen, greedy())

    def gumbel(seed: UInt32[Array, ""], number: Int[Array, ""], step: Int[Array, ""]) -> Float[Array, " V"]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
        return jax.random.gumbel(key, scores.shape[1:], jnp.float32)

    def among_all(scaled: Float[Array, "B V"], noise: Float[Array, "B V"]) -> Int[Array, " B"]:
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)

    def among_likeliest(scaled: Float[Array, "B V"], noise: Float[Array, "B V"]) -> Int[Array, " B"]:
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        ranks = jnp.arange(scaled.shape[1])[None]
        count, share = top_k[:, None], top_p[:, None]
        ranked = jnp.where((count == 0) | (ranks < count), ranked, -jnp.inf)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # With top_p = 1, rounding of the sum must not drop tokens.
        ranked = jnp.where((share == 1) | (before < share), ranked, -jnp.inf)
        rank = jnp.argmax(ranked + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(jnp.any(temperature > 0), sampled, greedy)
