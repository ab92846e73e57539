"""The ids of an encoder-decoder's prompts: those of the encoder first, then those that the decoder begins with."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from spt_jax.data.both_sides import decoder_start
from spt_jax.models.attention import Stream

# Widths of the decoder's ids are rounded up to a multiple of this, so that few programs are compiled.
_WIDTH = 8


def decoder_length(ids: Int[np.ndarray, " T"], start_id: int) -> int:
    """Returns the number of ids of a prompt that the decoder reads; 0 if there is no start token.

    Args:
      ids: the ids of the prompt.
      start_id: the id of the start token.
    """
    start = decoder_start(ids, start_id)
    return 0 if start is None else len(ids) - start


def decoder_width(count: int, length: int) -> int:
    """Returns the width U of the decoder's ids in rows of `length` ids, of which `count` are the decoder's.

    Args:
      count: the most ids of a row that the decoder reads, at least 1 and below `length`.
      length: the number T of ids of a row, with padding.
    """
    return count if count == 1 else min(-(-count // _WIDTH) * _WIDTH, length - 1)


def decoder_indices(lengths: Sequence[int], counts: Sequence[int], width: int, length: int) -> Int[np.ndarray, "B U"]:
    """Returns the indices of the ids of each row that the decoder reads, which are the last ones; T for padding.

    Args:
      lengths: the number of real ids of each row.
      counts: how many of these the decoder reads.
      width: the width U.
      length: the number T of ids of a row, with padding.
    """
    found = np.full((len(lengths), width), length, np.int32)
    for row, size, count in zip(found, lengths, counts, strict=True):
        row[:count] = np.arange(size - count, size)
    return found


def prefilled_indices(
    prompts: Sequence[Int[np.ndarray, " _"]], start_id: int | None, rows: int, length: int
) -> Int[np.ndarray, "B U"] | None:
    """Returns `decoder_indices` of prompts without their last ids; None if the decoder reads none of the others.

    Args:
      prompts: the ids of each prompt.
      start_id: the id of the start token; None if the base is not an encoder-decoder.
      rows: the number of rows, of which those after the prompts are padding.
      length: the number T of ids of a row, with padding.
    """
    if start_id is None:
        return None
    counts = [decoder_length(prompt, start_id) - 1 for prompt in prompts]
    if not any(counts):
        return None
    none = [0] * (rows - len(prompts))
    lengths = [len(prompt) - 1 for prompt in prompts]
    return decoder_indices([*lengths, *none], [*counts, *none], decoder_width(max(counts), length), length)


def both_sides(stream: Stream, decoder: Int[Array, "B U"], starts: Int[Array, "B 1"]) -> Stream:
    """Returns the stream of ids of which the last are the decoder's, with positions of their own.

    Args:
      stream: the stream of all ids, right-padded.
      decoder: the indices of the ids that the decoder reads, with T for padding.
      starts: the position of the first id of either side.
    """
    places = jnp.arange(stream.positions.shape[1])[None]
    first = decoder[:, :1]
    positions = jnp.where(places >= first, starts + places - first, stream.positions)
    return dataclasses.replace(stream, positions=positions, decoder=decoder)


def of_sides(stream: Stream) -> tuple[Int[Array, "B T"], Int[Array, "B U"], Int[Array, "B U"]]:
    """Returns the segments of the encoder's ids, and the positions and segments of the decoder's, with 0 elsewhere.

    Args:
      stream: the result of `both_sides`.
    """
    decoder, length = stream.decoder, stream.positions.shape[1]
    assert decoder is not None
    encoder = stream.segments.at[jnp.arange(len(decoder))[:, None], decoder].set(0, mode="drop")
    at = jnp.minimum(decoder, length - 1)
    positions, segments = (jnp.take_along_axis(own, at, axis=1) for own in (stream.positions, stream.segments))
    return encoder, positions, jnp.where(decoder < length, segments, 0)


def of_both_sides(
    stream: Stream, starts: Int[Array, "B 1"], segments: Int[Array, "B S"], pinned: Bool[Array, "B S"] | None
) -> tuple[Int[Array, "B _"], Int[Array, "B _"], Bool[Array, "B _"] | None]:
    """Returns the positions and segments of the slots, and what is pinned: T of the encoder, U of the decoder, and new.

    Args:
      stream: the stream of the prompts' ids.
      starts: the position of the first id of either side.
      segments: those of T + M slots, for the prompts and for new ids.
      pinned: what is pinned in these.
    """
    length = stream.positions.shape[1]
    new = jnp.arange(segments.shape[1] - length, dtype=jnp.int32)[None]
    if stream.decoder is None:
        return jnp.concatenate([stream.positions, starts + new], axis=1), segments, pinned
    encoder, positions, own = of_sides(stream)
    later = starts + own.sum(axis=1, keepdims=True) + new
    if pinned is not None:
        at = jnp.minimum(stream.decoder, length - 1)
        parts = pinned[:, :length], jnp.take_along_axis(pinned, at, axis=1), pinned[:, length:]
        pinned = jnp.concatenate(parts, axis=1)
    return (
        jnp.concatenate([stream.positions, positions, later], axis=1),
        jnp.concatenate([encoder, own, segments[:, length:]], axis=1),
        pinned,
    )
