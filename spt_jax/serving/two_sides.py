"""The slots of an encoder-decoder: the encoder's tokens at cross-attention, then the decoder's at self-attention.

A slot's cache has positions and segments for both: first the entries of cross-attention, which `admit` fills, and then
those of the decoder's self-attention, where new tokens go. A prompt's prefix is copied to the front of each. The keys
and values of the encoder's own attention are not kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from spt_jax.errors import ConfigError
from spt_jax.inference.two_sides import decoder_indices, decoder_length, decoder_width, of_sides
from spt_jax.models import memory
from spt_jax.models.attention import NEVER, Cache, Prefix, Stream
from spt_jax.models.layout import CROSS, SELF, Layout
from spt_jax.models.memory import KeysValues, Memory


def check_decoder_ids(layout: Layout, ids: Int[np.ndarray, " T"], count: int) -> None:
    """Checks that the decoder of an encoder-decoder reads as many ids of a request as of its template.

    Args:
      layout: that of the base.
      ids: the ids of the request.
      count: how many ids of the template the decoder reads.

    Raises:
      ConfigError: it does not.
    """
    own = count if layout.start_id is None else decoder_length(ids, layout.start_id)
    if own != count:
        raise ConfigError(
            f"the last {own} of the ids begin with the decoder's start token, {layout.start_id}, but {count} of the"
            " template do; use ids from `PromptBank.request_ids`"
        )


def decoder_ids(lengths: Int[np.ndarray, " N"], counts: Sequence[int], length: int) -> Int[np.ndarray, "N U"]:
    """Returns the indices of the ids that the decoder reads of requests, with T for padding.

    Args:
      lengths: the number of ids of each request.
      counts: how many of these the decoder reads.
      length: the number T of ids of each request, with padding.
    """
    return decoder_indices(lengths.tolist(), counts, decoder_width(max(counts), length), length)


def crossed(cache: Cache, layout: Layout) -> int:
    """Returns the number of entries of a slot that are those of cross-attention; 0 for a base with one side."""
    return _entries(cache.memory[CROSS], -1) if layout.encodes else 0


def nearest(cache: Cache, crossed: int, reach: int) -> Cache:
    """Returns the first entries of each site, which a decode step reads.

    Args:
      cache: the cache of all slots.
      crossed: the result of the function of this name.
      reach: the number of entries to read at each site.
    """

    def parts(values: Array) -> Array:
        if not crossed:
            return values[:, :reach]
        return jnp.concatenate([values[:, :reach], values[:, crossed : crossed + reach]], axis=1)

    found = dict(cache.memory)
    if crossed:
        pairs = found[CROSS]
        assert isinstance(pairs, KeysValues)
        # The model tells from the length of these where the decoder's entries begin.
        found[CROSS] = KeysValues(pairs.keys[..., :reach], pairs.values[..., :reach, :])
    positions, segments, pinned = jax.tree.map(parts, (cache.positions, cache.segments, cache.pinned))
    return Cache(found, positions, segments, pinned)


def put_requests(
    cache: Cache, at: Int[Array, " N"], prefix: Prefix | None, found: Memory, stream: Stream
) -> tuple[Cache, int]:
    """Stores requests in slots.

    Args:
      cache: the cache of all slots.
      at: the slots, whose segments are 0.
      prefix: the memory of the prompt of each request, stacked; None for none.
      found: the memory of the requests' ids, in the precision of the cache.
      stream: their stream, from `both_sides`.

    Returns:
      The cache, and the number of entries that are filled at the decoder's self-attention, padding included.
    """
    encoder_segments, *decoder = of_sides(stream)
    pins, pinned_tokens, indices = None, stream.pinned, stream.decoder
    if pinned_tokens is not None and indices is not None:
        pins = jnp.take_along_axis(pinned_tokens, jnp.minimum(indices, pinned_tokens.shape[1] - 1), axis=1)
    sites: tuple[tuple[str, int, Any], ...] = (
        (CROSS, 0, (stream.positions, encoder_segments, None)),
        (SELF, _entries(cache.memory[CROSS], -1), (*decoder, pins)),
    )
    filled = 0
    for name, begin, own in sites:
        place = 0
        for part, positions, segments, pinned in (*_of_prefix(prefix, name), (found[name], *own)):
            count = positions.shape[1]
            put = memory.put_rows({name: cache.memory[name]}, memory.to_cache({name: part}), at, _slice(place, count))
            where = at, _slice(begin + place, count)
            cache = dataclasses.replace(
                cache,
                memory={**cache.memory, **put},
                positions=cache.positions.at[where].set(positions),
                segments=cache.segments.at[where].set(segments),
                pinned=None
                if cache.pinned is None
                else cache.pinned.at[where].set(False if pinned is None else pinned),
            )
            place += count
        filled = place
    return cache, filled


def stacked(prefixes: list[Prefix]) -> Prefix | None:
    """Stacks the prefixes of several rows, of one length, along a new first axis; None if there are none."""
    return jax.tree.map(lambda *own: jnp.stack(own), *prefixes) if prefixes else None


def _of_prefix(
    prefix: Prefix | None, name: str
) -> list[tuple[KeysValues, Int[Array, "N P"], Int[Array, "N P"], Bool[Array, "N P"] | None]]:
    """Returns keys and values, positions, segments and what is pinned of stacked prefixes at a site, if it has some."""
    pairs: Any = None if prefix is None else prefix.memory.get(name)
    if prefix is None or pairs is None or not _entries(pairs, -3):
        return []
    by_layer: KeysValues = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), pairs)
    held = prefix.positions != NEVER
    return [(by_layer, jnp.where(held, prefix.positions, 0), held.astype(jnp.int32), prefix.pinned)]


def _entries(pairs: Any, axis: int) -> int:
    return pairs.keys.shape[axis]


def _slice(start: int, count: int) -> slice:
    return slice(start, start + count)
