"""One side of an encoder-decoder: its layers, and what they attend to."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Scoring, Source, attend
from spt_jax.models.config import DecoderConfig
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.layers import Linear, Mlp, Norm, scaled, table_param
from spt_jax.models.layout import CROSS, ENCODER, SELF
from spt_jax.models.memory import KeysValues, Memory, from_cache
from spt_jax.models.relative_bias import bias_of
from spt_jax.models.rope import rotate
from spt_jax.models.stacks import POLICIES, Remat
from spt_jax.runtime.sharding import ROWS, constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Site:
    """What the layers of a side attend to at one site.

    Attributes:
      prefix: keys and values of the prefix, [L, *B, P, K, H], or of one layer; None for none.
      cache: those of the cache, in the axes of a cache; None for none.
      masks: the masks of the sources in the order prefix, cache, tokens.
      buckets: the buckets of the relative position biases of each source; None for none.
      tokens: the encoder's hidden states for cross-attention; None if the layer's own tokens, or a cache, are meant.
      biases: the relative position biases of each source, if the layers share them.
      window_masks: the masks of the sources in layers with a sliding window; None if there are none.
      cos_sin: cosines and sines of the RoPE of the tokens; None for none.
      local_cos_sin: those of layers with a sliding window, if they differ.
    """

    prefix: KeysValues | None
    cache: KeysValues | None
    masks: tuple[Bool[Array, "B T S"], ...]
    buckets: tuple[Int[Array, "#B T S"], ...] | None
    tokens: Float[Array, "B T D"] | None = None
    biases: tuple[Float[Array, "#B N T S"], ...] | None = None
    window_masks: tuple[Bool[Array, "B T S"], ...] | None = None
    cos_sin: tuple[Float[Array, "B T R"], Float[Array, "B T R"]] | None = None
    local_cos_sin: tuple[Float[Array, "B T R"], Float[Array, "B T R"]] | None = None


class SiteAttention(nn.Module):
    """Attention at one site, or with one softmax at several."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        heads = config.heads, config.kv_heads, config.kv_heads
        self.query, self.key, self.value = (Linear(n * config.head_size, config.qkv_bias) for n in heads)
        self.output = Linear(config.width, config.output_bias)
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = Norm(config), Norm(config)

    def remembered(self, x: Float[Array, "B T D"], cos_sin: tuple[Array, Array] | None = None) -> KeysValues:
        """Returns the keys, normalized and after RoPE where the config says so, and values of tokens."""
        shape = (*x.shape[:2], self.config.kv_heads, self.config.head_size)
        keys = self.key(x).reshape(shape)
        keys = self.key_norm(keys) if self.config.qk_norm == "head" else keys
        return KeysValues(keys if cos_sin is None else rotate(keys, cos_sin), self.value(x).reshape(shape))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        parts: Sequence[tuple[Site, KeysValues | None]],
        table: Float[Array, "buckets N"] | None,
    ) -> Float[Array, "B T D"]:
        """Attends to the sources of the sites.

        Args:
          x: the tokens that attend.
          parts: the sites, the first of which has the RoPE of x, each with the keys and values of the tokens that the
            site is about, its last source; None for none.
          table: the layer's relative position biases, if the layers do not share them.
        """
        config, (first, _) = self.config, parts[0]
        queries = self.query(x).reshape(*x.shape[:2], config.heads, config.head_size)
        queries = self.query_norm(queries) if config.qk_norm == "head" else queries
        queries = queries if first.cos_sin is None else rotate(queries, first.cos_sin)
        sources = [source for site, own in parts for source in _sources(site, own, table, queries.dtype)]
        scoring = Scoring(config.score_scale or config.head_size**-0.5, config.score_cap)
        out = attend(queries, sources, scoring)
        return self.output(out.reshape(*x.shape[:2], config.heads * config.head_size))


def _sources(
    site: Site, own: KeysValues | None, table: Float[Array, "buckets N"] | None, dtype: jnp.dtype
) -> list[Source]:
    """Returns the sources of a site, whose prefix and cache get the dtype of the queries."""
    prefix, cache = jax.tree.map(lambda a: a.astype(dtype), (site.prefix, site.cache))
    if cache is not None:
        cache = from_cache(cache, site.masks[0 if prefix is None else 1].shape[-1])
    pairs = [pair for pair in (prefix, cache, own) if pair is not None]
    biases: Any = site.biases
    if biases is None and site.buckets is not None and table is not None:
        biases = [bias_of(table, bucket) for bucket in site.buckets]
    return [
        Source(pair.keys, pair.values, mask, bias)
        for pair, mask, bias in zip(pairs, site.masks, biases or [None] * len(pairs), strict=True)
    ]


class SideBlock(nn.Module):
    """One layer: self-attention, in the decoder cross-attention, and an MLP, each with norm and residual addition."""

    config: EncoderDecoderConfig
    crosses: bool
    mesh: Mesh | None

    def setup(self) -> None:
        layer = self.config.layer
        self.attention_norm, self.attention = Norm(layer), SiteAttention(layer)
        if self._apart:
            self.cross_norm, self.cross_attention = Norm(layer), SiteAttention(layer)
        self.mlp_norm, self.mlp = Norm(layer), Mlp(layer)
        if layer.norm_place == "around":
            self.attention_out_norm, self.mlp_out_norm = Norm(layer), Norm(layer)
            if self._apart:
                self.cross_out_norm = Norm(layer)
        if self._biased:
            self.relative_bias = bias_param(self, self.config)

    @property
    def _apart(self) -> bool:
        """Whether the layer has cross-attention beside its self-attention."""
        return self.crosses and not self.config.merged

    @property
    def _biased(self) -> bool:
        """Whether the layer has relative position biases of its own."""
        return self.config.relative and not self.config.shared_bias

    def __call__(
        self, x: Float[Array, "B T D"], own: Site, cross: Site | None
    ) -> tuple[Float[Array, "B T D"], dict[str, KeysValues]]:
        """Returns the layer's output, and the keys and values of the tokens of each site."""
        x = constrain(self.mesh, x, ROWS)
        kept: dict[str, KeysValues] = {}

        def encoded(attention: SiteAttention) -> list[tuple[Site, KeysValues | None]]:
            if cross is None:
                return []
            if cross.tokens is not None:
                kept[CROSS] = attention.remembered(cross.tokens)
            return [(cross, kept.get(CROSS))]

        def attended(x: Array) -> Array:
            found = kept[SELF if self.crosses else ENCODER] = self.attention.remembered(x, own.cos_sin)
            merged = encoded(self.attention) if self.config.merged else []
            return self.attention(x, [(own, found), *merged], self.relative_bias if self._biased else None)

        x = self._added("attention", x, attended)
        if cross is not None and self._apart:
            x = self._added("cross", x, lambda x: self.cross_attention(x, encoded(self.cross_attention), None))
        return self._added("mlp", x, self.mlp), kept

    def _added(self, part: str, x: Float[Array, "B T D"], function: Callable[[Array], Array]) -> Float[Array, "B T D"]:
        """Returns x plus the output of a part of the layer, with norms where the config places them."""
        norm, place = getattr(self, f"{part}_norm"), self.config.norm_place
        if place == "sum":
            return norm(x + function(x))
        y = function(norm(x))
        return x + (getattr(self, f"{part}_out_norm")(y) if place == "around" else y)

    def cross_memory(self, encoded: Float[Array, "B T D"]) -> KeysValues:
        """Returns the keys and values of the encoder's tokens for cross-attention."""
        return (self.cross_attention if self._apart else self.attention).remembered(encoded)


def bias_param(module: nn.Module, config: EncoderDecoderConfig) -> Float[Array, "buckets N"]:
    """Returns the table of relative position biases of a module."""
    return module.param("relative_bias", nn.initializers.normal(0.02), (config.bias_buckets, config.heads))


class Side(nn.Module):
    """The layers of the encoder or, with `crosses`, of the decoder, scanned, and the norm after the last one."""

    config: EncoderDecoderConfig
    crosses: bool
    mesh: Mesh | None
    remat: Remat

    def setup(self) -> None:
        config = self.config
        if config.relative and config.shared_bias:
            self.relative_bias = bias_param(self, config)
        if config.positions == "learned":
            shape = config.max_positions, config.width
            self.position_embedding = self.param("positions", nn.initializers.normal(0.02), shape)
        if self.crosses and config.decoder_embedding:
            self.embedding = table_param(self, "embedding", (config.vocab_size, config.width))
        if config.embedding_norm:
            self.embedding_norm = Norm(config.layer)
        if config.final_norm:
            self.final_norm = Norm(config.layer)
        # Linen checks the shapes of arrays, and a quantized kernel has several.
        stored = self.has_variable("params", "layers")
        self.layers = self.get_variable("params", "layers") if stored else self.param("layers", self._init_layers)

    @nn.nowrap
    def _block(self) -> SideBlock:
        return SideBlock(self.config, self.crosses, self.mesh, parent=None)

    @nn.nowrap
    def _init_layers(self, key: Array) -> Any:
        config = self.config
        count = config.decoder_layers if self.crosses else config.encoder_layers
        x, mask, bucket = jnp.zeros((1, 1, config.width)), jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1, 1), jnp.int32)
        angles = jnp.zeros((1, 1, 0 if config.rope is None else config.head_size // 2))
        own = Site(None, None, (mask,), (bucket,) if config.relative else None)
        own = own if config.rope is None else dataclasses.replace(own, cos_sin=(angles, angles))
        cross = Site(None, None, (mask,), None, x) if self.crosses else None
        return jax.vmap(lambda key: self._block().init(key, x, own, cross)["params"])(jax.random.split(key, count))

    def __call__(
        self, x: Float[Array, "B T D"], places: Int[Array, "B T"], own: Site, cross: Site | None, return_memory: bool
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """Runs the layers.

        Args:
          x: the tokens' embeddings.
          places: the position of each token in its sequence, after those of a prefix.
          own: what they attend to in self-attention.
          cross: what they attend to in cross-attention.
          return_memory: also return the keys and values of the tokens of each site.

        Returns:
          Hidden states, normalized if the config says so, and the memory, empty if it is not requested.
        """
        if own.buckets is not None and self.config.shared_bias:
            own = dataclasses.replace(own, biases=tuple(bias_of(self.relative_bias, b) for b in own.buckets))
        x = scaled(x, self.config.input_scale)
        if self.config.positions == "learned":
            x = x + jnp.take(self.position_embedding, places, axis=0, mode="clip").astype(x.dtype)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        block, sites = self._block(), (own, cross)
        prefixes, caches = ([None if site is None else getattr(site, name) for site in sites] for name in _BY_LAYER)

        def layer(x: Array, given: Any) -> tuple[Array, Any]:
            index, params, prefix, windowed = given
            cache = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), caches)
            of_layer = [_of_layer(*one, windowed) for one in zip(sites, prefix, cache, strict=True)]
            x, kept = block.apply({"params": params}, x, *of_layer)
            return x, kept if return_memory else {}

        run = jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[self.remat])
        count = jax.tree.leaves(self.layers)[0].shape[0]
        windows = self.config.decoder_windows if self.crosses else self.config.encoder_windows
        windowed = jnp.isin(jnp.arange(count), jnp.asarray(windows, jnp.int32))
        x, memory = jax.lax.scan(run, x, (jnp.arange(count), self.layers, prefixes, windowed))
        return self.final_norm(x) if self.config.final_norm else x, memory

    def cross_memory(self, encoded: Float[Array, "B T D"]) -> Memory:
        """Returns the keys and values [L, B, T, K, H] of the encoder's tokens for cross-attention."""
        block = self._block()

        def of_layer(params: Any) -> Any:
            return block.apply({"params": params}, encoded, method=SideBlock.cross_memory)

        return {CROSS: jax.lax.map(of_layer, self.layers)}


def _of_layer(
    site: Site | None, prefix: KeysValues | None, cache: KeysValues | None, windowed: Bool[Array, ""]
) -> Site | None:
    """Returns the site of a layer, which may have a sliding window."""
    if site is None:
        return None
    site = dataclasses.replace(site, prefix=prefix, cache=cache)
    if site.window_masks is None:
        return site
    masks = tuple(jnp.where(windowed, *both) for both in zip(site.window_masks, site.masks, strict=True))
    cos_sin = site.cos_sin
    if cos_sin is not None and site.local_cos_sin is not None:
        cos_sin = jax.tree.map(functools.partial(jnp.where, windowed), site.local_cos_sin, cos_sin)
    return dataclasses.replace(site, masks=masks, cos_sin=cos_sin)


_BY_LAYER = ("prefix", "cache")
