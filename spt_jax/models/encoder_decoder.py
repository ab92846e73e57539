"""An encoder-decoder in Flax Linen: embeddings, the scanned layers of both sides, and the output matrix."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.errors import ConfigError
from spt_jax.models.attention import (
    NEVER,
    Cache,
    GatedPrefix,
    Prefix,
    Stream,
    related,
    soft_capped,
    visible,
)
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.layers import scaled, table_param, table_rows, take_rows
from spt_jax.models.layout import CROSS, ENCODER, SELF, Group, Layout
from spt_jax.models.memory import KeysValues, Memory
from spt_jax.models.output_matrix import matrix_products
from spt_jax.models.relative_bias import position_bucket
from spt_jax.models.rope import rotation
from spt_jax.models.self_attention import of_row
from spt_jax.models.side import Side, Site
from spt_jax.models.stacks import Remat


class DecoderTokens(NamedTuple):
    """The decoder's tokens of each row.

    Attributes:
      at: their indices in the row, below T.
      stream: their positions and segments, 0 for padding.
    """

    at: Int[Array, "B U"]
    stream: Stream


class EncoderDecoder(nn.Module):
    """Embeddings, both sides' layers and norms, and the output matrix.

    Its parameters are a plain dict: `embedding` [V, D], `output` [D, V] if untied, `logit_bias` [V] and `own_row` [D]
    if there are any, and for `encoder` and `decoder` each `layers` with all leaves stacked [L, ...], and what the
    config has of `positions`, `embedding` of the decoder, `embedding_norm`, `final_norm`, and `relative_bias`
    [buckets, N] that the layers share.
    """

    config: EncoderDecoderConfig
    remat: Remat = "dots"
    mesh: Mesh | None = None

    def setup(self) -> None:
        config = self.config
        self.embedding = table_param(self, "embedding", (config.vocab_size, config.width))
        if not config.tied:
            self.output = table_param(self, "output", (config.width, config.vocab_size))
        if config.own_row_id is not None:
            self.own_row = self.param("own_row", nn.initializers.normal(0.02), (config.width,))
        if config.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (config.vocab_size,))
        self.encoder = Side(config, False, self.mesh, self.remat)
        self.decoder = Side(config, True, self.mesh, self.remat)

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns rows of the embedding table, scaled in families that do; ids must be in [0, V)."""
        rows = take_rows(self.mesh, self.embedding, ids) if ids.ndim == 2 else table_rows(self.embedding, ids)
        rows = scaled(rows, self.config.embedding_scale)
        if self.config.own_row_id is None:
            return rows
        return jnp.where((ids == self.config.own_row_id)[..., None], self.own_row.astype(rows.dtype), rows)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns next-token logits in float32 for hidden states of the decoder returned by `__call__`."""
        with jax.named_scope("logits"):
            config = self.config
            tied = self.decoder.embedding if config.decoder_embedding else self.embedding
            hidden = scaled(hidden, config.output_scale)
            logits = matrix_products(hidden, tied if config.tied else self.output, by_token=config.tied)
            if config.logit_bias:
                bias = self.logit_bias.astype(jnp.float32)
                logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
            return soft_capped(logits, config.logit_cap)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T D"] | None, Memory | None]:
        """Runs both sides on their tokens of the rows; arguments and results are those of `Model.run`.

        The encoder tokens of an example must be next to each other and in order, as `pack` writes them. If all T tokens
        are the decoder's (U = T), the encoder does not run, and a cache must hold the keys and values of its tokens.
        The memory has the keys and values of the encoder's T tokens at two sites, and of the decoder's U tokens at one.

        Raises:
          ConfigError: there is a gated prefix, or a cache for rows with encoder tokens.
        """
        if gated is not None:
            raise ConfigError("an encoder-decoder has no gated keys and values")
        length = x.shape[1]
        encodes = rows.decoder is None or rows.decoder.shape[1] < length
        if encodes and cache is not None:
            raise ConfigError("the rows that follow a cache must consist of the decoder's tokens")
        given = _Given(self.config, rows.prompt_index, prefix, cache)
        memory: Memory = {}
        hidden = encoded = None
        segments = jnp.zeros_like(rows.segments)
        if encodes:
            segments = rows.segments if rows.decoder is None else _without(rows.segments, rows.decoder)
            site = self._encoder_site(rows, segments, given)
            encoded, memory = self.encoder(x, rows.positions, site, None, return_memory)
            hidden = encoded
        if rows.decoder is not None:
            own = _decoder_tokens(rows, rows.decoder)
            inputs = self._decoder_inputs(x, rows, own.at)
            sites = self._self_site(own.stream, given), self._cross_site(own.stream, segments, encoded, given)
            outputs, found = self.decoder(inputs, own.stream.positions, *sites, return_memory)
            memory = {**memory, **found}
            # Padding has the index T, where nothing is written.
            into = jnp.zeros_like(x) if hidden is None else hidden
            hidden = into.at[jnp.arange(len(x))[:, None], rows.decoder].set(outputs, mode="drop")
        elif return_memory and encoded is not None:
            memory = {**memory, **self.decoder.cross_memory(encoded)}
        return hidden if return_hidden else None, memory if return_memory else None

    @nn.nowrap
    def _decoder_inputs(self, x: Float[Array, "B T D"], rows: Stream, at: Int[Array, "B U"]) -> Float[Array, "B U D"]:
        """Returns the embeddings of the decoder's tokens: of its own table, if it has one, and else those in x.

        Raises:
          ValueError: the decoder has a table of its own, and the stream has no ids.
        """
        given = jnp.take_along_axis(x, at[:, :, None], axis=1)
        if not self.config.decoder_embedding:
            return given
        if rows.ids is None:
            raise ValueError("the decoder embeds its tokens itself, so that Stream.ids must hold the ids of the tokens")
        ids = jnp.take_along_axis(rows.ids, at, axis=1)
        # The table has no rows of virtual tokens.
        is_virtual = ids >= self.config.vocab_size
        own = take_rows(self.mesh, self.decoder.embedding, jnp.where(is_virtual, 0, ids)).astype(x.dtype)
        return jnp.where(is_virtual[:, :, None], given, own)

    @nn.nowrap
    def _encoder_site(self, rows: Stream, segments: Int[Array, "B T"], given: "_Given") -> Site:
        """The encoder's self-attention: all encoder tokens of the same example, and a prefix before them."""
        places = jnp.arange(rows.positions.shape[1])[None]
        own = segments[:, None, :] == segments[:, :, None]
        bucket = self._bucket(places, places, bidirectional=True)
        masks, buckets = given.of_prefix(ENCODER, rows.positions, self._bucket, bidirectional=True)
        masks, windows = [*masks, own], None
        if self.config.encoder_windows:
            keys = [*given.places_of(ENCODER, len(segments)), (rows.positions, rows.pinned)]
            windows = _windowed(rows, masks, keys, self.config.encoder_reach)
        return self._site(given, ENCODER, rows, masks, windows, [*buckets, bucket])

    @nn.nowrap
    def _self_site(self, own: Stream, given: "_Given") -> Site:
        """The decoder's self-attention: earlier decoder tokens of the same example or its parent."""
        masks, buckets = given.of_prefix(SELF, own.positions, self._bucket, bidirectional=False)
        keys: list[tuple[Any, Any, Any]] = [(own.positions, own.segments, own.pinned)]
        if given.cache is not None:
            start, cache = _encoded(given.cache), given.cache
            keys.insert(0, jax.tree.map(lambda a: a[:, start:], (cache.positions, cache.segments, cache.pinned)))
        masks += [visible(own, positions, segments) for positions, segments, _ in keys]
        buckets += [self._bucket(own.positions, positions, bidirectional=False) for positions, *_ in keys]
        windows = None
        if self.config.decoder_windows:
            at = [*given.places_of(SELF, len(own.positions)), *((positions, pinned) for positions, _, pinned in keys)]
            windows = _windowed(own, masks, at, (self.config.window - 1, NEVER))
        return self._site(given, SELF, own, masks, windows, buckets)

    @nn.nowrap
    def _site(
        self, given: "_Given", name: str, queries: Stream, masks: list[Any], windows: Any, buckets: list[Any]
    ) -> Site:
        """Self-attention of a side."""
        ropes = self.config.rope, self.config.local_rope
        cos_sin, local_cos_sin = (
            None if rope is None else rotation(rope, self.config.head_size, queries.positions) for rope in ropes
        )
        by_source = tuple(buckets) if self.config.relative else None
        cache = given.cached(name) if name == SELF else None
        return Site(
            given.prefix_of(name),
            cache,
            tuple(masks),
            by_source,
            window_masks=windows,
            cos_sin=cos_sin,
            local_cos_sin=local_cos_sin,
        )

    @nn.nowrap
    def _cross_site(
        self, own: Stream, segments: Int[Array, "B T"], encoded: Float[Array, "B T D"] | None, given: "_Given"
    ) -> Site:
        """Cross-attention: the encoder tokens of the same example or its parent."""
        masks, _ = given.of_prefix(CROSS, own.positions, None, bidirectional=False)
        if given.cache is not None:
            segments = given.cache.segments[:, : _encoded(given.cache)]
        if encoded is not None or given.cache is not None:
            masks.append(related(own, segments))
        return Site(given.prefix_of(CROSS), given.cached(CROSS), tuple(masks), None, encoded)

    @nn.nowrap
    def _bucket(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, bidirectional: bool
    ) -> Int[Array, "B T S"]:
        config = self.config
        return position_bucket(
            keys[:, None, :] - queries[:, :, None],
            bidirectional=bidirectional,
            buckets=config.bias_buckets,
            max_distance=config.bias_max_distance,
        )


@dataclasses.dataclass(frozen=True)
class _Given:
    """What rows are given of earlier tokens."""

    config: EncoderDecoderConfig
    prompt_index: Int[Array, " B"] | None
    prefix: Prefix | None
    cache: Cache | None

    def prefix_of(self, site: str) -> KeysValues | None:
        """The prefix's keys and values of a site's layers, with the layers first; None if it has none there."""
        pairs = None if self.prefix is None else self.prefix.memory.get(site)
        if not isinstance(pairs, KeysValues) or not pairs.keys.shape[-3]:
            return None
        if self.prompt_index is None:
            return pairs
        return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1)[:, self.prompt_index], pairs)

    def places_of(self, site: str, rows: int) -> list[tuple[Int[Array, "B P"], Bool[Array, "B P"] | None]]:
        """Returns the positions of a site's prefix in each row, and which of them are pinned; empty if it has none."""
        if self.prefix is None or self.prefix_of(site) is None:
            return []

        def by_row(array: Array) -> Array:
            own = of_row(self.prompt_index, array)
            return jnp.broadcast_to(own, (rows, own.shape[-1]))

        pinned = self.prefix.pinned
        return [(by_row(self.prefix.positions), None if pinned is None else by_row(pinned))]

    def of_prefix(
        self, site: str, positions: Int[Array, "B T"], bucket: Any, *, bidirectional: bool
    ) -> tuple[list[Bool[Array, "B T P"]], list[Int[Array, "B T P"]]]:
        """Returns the masks and the buckets of a site's prefix, one each, or none.

        Every token follows the prefix's P positions, so that the distance to the last one is -1 for the first token.
        """
        if self.prefix is None or self.prefix_of(site) is None:
            return [], []
        ((places, _),) = self.places_of(site, len(positions))
        queries = Stream(positions, positions, positions)
        found = [] if bucket is None else [bucket(positions, places, bidirectional=bidirectional)]
        return [visible(queries, places, None)], found

    def cached(self, site: str) -> KeysValues | None:
        """The cache's keys and values of a site's layers; None without a cache."""
        pairs = None if self.cache is None else self.cache.memory[site]
        return pairs if isinstance(pairs, KeysValues) else None


def _windowed(
    queries: Stream, masks: list[Any], keys: Sequence[tuple[Any, Any]], reach: tuple[int, int]
) -> tuple[Any, ...]:
    """Returns the masks [B, T, S] of layers with a sliding window, given those of others.

    Args:
      queries: the tokens that attend.
      masks: those of each source.
      keys: the positions [B, S] of each source, and which of them a window never hides, or None.
      reach: how many positions before and after a query it contains.
    """
    before, after = reach
    found = []
    for mask, (places, pinned) in zip(masks, keys, strict=True):
        apart = queries.positions[:, :, None] - places[:, None, :]
        near = (apart <= before) & (-apart <= after)
        found.append(mask & (near if pinned is None else near | pinned[:, None, :]))
    return tuple(found)


def _encoded(cache: Cache) -> int:
    """Returns the number of slots of a cache that are the encoder's tokens."""
    pairs = cache.memory[CROSS]
    assert isinstance(pairs, KeysValues)
    return pairs.keys.shape[-1]


def _without(segments: Int[Array, "B T"], decoder: Int[Array, "B U"]) -> Int[Array, "B T"]:
    """Returns the segments of the encoder's tokens, with 0 for those of the decoder."""
    return jnp.asarray(segments).at[jnp.arange(len(segments))[:, None], decoder].set(0, mode="drop")


def _decoder_tokens(rows: Stream, decoder: Int[Array, "B U"]) -> DecoderTokens:
    length = rows.positions.shape[1]
    at = jnp.minimum(decoder, length - 1)
    take = functools.partial(jnp.take_along_axis, indices=at, axis=1)
    segments = jnp.where(decoder < length, take(rows.segments), 0)
    pinned = None if rows.pinned is None else take(rows.pinned)
    stream = Stream(take(rows.positions), segments, take(rows.parents), rows.prompt_index, pinned=pinned)
    return DecoderTokens(at, stream)


@functools.lru_cache(maxsize=64)
def encoder_decoder_layout(config: EncoderDecoderConfig) -> Layout:
    """Returns the layout of an encoder-decoder. The decoder's layers are numbered after the encoder's."""
    encoder = tuple(range(config.encoder_layers))
    decoder = tuple(range(config.encoder_layers, config.layers))
    shape = config.kv_heads or config.heads, config.head_size, config.head_size
    groups = {
        SELF: Group(decoder, *shape),
        CROSS: Group(decoder, *shape, site="cross"),
        ENCODER: Group(encoder, *shape, site="encoder"),
    }
    sizes = config.vocab_size, config.width, config.max_positions
    windowed = bool(config.encoder_windows or config.decoder_windows)
    return Layout(*sizes, groups, windowed=windowed, causal=False, start_id=config.start_id, forced_id=config.forced_id)
