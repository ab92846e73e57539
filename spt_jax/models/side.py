"""One side of an encoder-decoder: its layers, and what they attend to."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from spt_jax.models.attention import Scoring, Source, attend
from spt_jax.models.config import DecoderConfig
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.layers import Linear, Mlp, Norm
from spt_jax.models.layout import CROSS, ENCODER, SELF
from spt_jax.models.memory import KeysValues, Memory, from_cache
from spt_jax.models.relative_bias import bias_of
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
    """

    prefix: KeysValues | None
    cache: KeysValues | None
    masks: tuple[Bool[Array, "B T S"], ...]
    buckets: tuple[Int[Array, "#B T S"], ...] | None
    tokens: Float[Array, "B T D"] | None = None
    biases: tuple[Float[Array, "#B N T S"], ...] | None = None


class SiteAttention(nn.Module):
    """Attention at one site."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        size = config.heads * config.head_size
        self.query, self.key, self.value = (Linear(size, config.qkv_bias) for _ in range(3))
        self.output = Linear(config.width, config.output_bias)

    def remembered(self, x: Float[Array, "B T D"]) -> KeysValues:
        """Returns the keys and values of tokens."""
        shape = (*x.shape[:2], self.config.heads, self.config.head_size)
        return KeysValues(self.key(x).reshape(shape), self.value(x).reshape(shape))

    def __call__(
        self, x: Float[Array, "B T D"], site: Site, own: KeysValues | None, table: Float[Array, "buckets N"] | None
    ) -> Float[Array, "B T D"]:
        """Attends to the sources of a site.

        Args:
          x: the tokens that attend.
          site: the sources.
          own: the keys and values of the tokens that the site is about, its last source; None for none.
          table: the layer's relative position biases, if the layers do not share them.
        """
        config = self.config
        queries = self.query(x).reshape(*x.shape[:2], config.heads, config.head_size)
        prefix, cache = jax.tree.map(lambda a: a.astype(queries.dtype), (site.prefix, site.cache))
        if cache is not None:
            cache = from_cache(cache, site.masks[0 if prefix is None else 1].shape[-1])
        pairs = [pair for pair in (prefix, cache, own) if pair is not None]
        biases: Any = site.biases
        if biases is None and site.buckets is not None and table is not None:
            biases = [bias_of(table, bucket) for bucket in site.buckets]
        sources = [
            Source(pair.keys, pair.values, mask, bias)
            for pair, mask, bias in zip(pairs, site.masks, biases or [None] * len(pairs), strict=True)
        ]
        out = attend(queries, sources, Scoring(config.score_scale or config.head_size**-0.5))
        return self.output(out.reshape(*x.shape[:2], config.heads * config.head_size))


class SideBlock(nn.Module):
    """One layer: self-attention, in the decoder cross-attention, and an MLP, each with norm and residual addition."""

    config: EncoderDecoderConfig
    crosses: bool
    mesh: Mesh | None

    def setup(self) -> None:
        layer = self.config.layer
        self.attention_norm, self.attention = Norm(layer), SiteAttention(layer)
        if self.crosses:
            self.cross_norm, self.cross_attention = Norm(layer), SiteAttention(layer)
        self.mlp_norm, self.mlp = Norm(layer), Mlp(layer)
        if self._biased:
            self.relative_bias = bias_param(self, self.config)

    @property
    def _biased(self) -> bool:
        """Whether the layer has relative position biases of its own."""
        return self.config.relative and not self.config.shared_bias

    def __call__(
        self, x: Float[Array, "B T D"], own: Site, cross: Site | None
    ) -> tuple[Float[Array, "B T D"], dict[str, KeysValues]]:
        """Returns the layer's output, and the keys and values of the tokens of each site."""
        x = constrain(self.mesh, x, ROWS)
        before = self.config.norm_place == "before"

        def normed(norm: Norm, x: Array) -> Array:
            return norm(x) if before else x

        def added(norm: Norm, x: Array, y: Array) -> Array:
            return x + y if before else norm(x + y)

        inputs = normed(self.attention_norm, x)
        kept = {SELF if self.crosses else ENCODER: self.attention.remembered(inputs)}
        table = self.relative_bias if self._biased else None
        x = added(self.attention_norm, x, self.attention(inputs, own, next(iter(kept.values())), table))
        if cross is not None:
            if cross.tokens is not None:
                kept[CROSS] = self.cross_attention.remembered(cross.tokens)
            inputs = normed(self.cross_norm, x)
            x = added(self.cross_norm, x, self.cross_attention(inputs, cross, kept.get(CROSS), None))
        return added(self.mlp_norm, x, self.mlp(normed(self.mlp_norm, x))), kept

    def cross_memory(self, encoded: Float[Array, "B T D"]) -> KeysValues:
        """Returns the keys and values of the encoder's tokens for cross-attention."""
        return self.cross_attention.remembered(encoded)


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
        own = Site(None, None, (mask,), (bucket,) if config.relative else None)
        cross = Site(None, None, (mask,), None, x) if self.crosses else None
        return jax.vmap(lambda key: self._block().init(key, x, own, cross)["params"])(jax.random.split(key, count))

    def __call__(
        self, x: Float[Array, "B T D"], places: Int[Array, "B T"], own: Site, cross: Site | None, return_memory: bool
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """Runs the layers.

        Args:
          x: the tokens' embeddings.
          places: the position of each token in its sequence, from 0, without those of a prefix.
          own: what they attend to in self-attention.
          cross: what they attend to in cross-attention.
          return_memory: also return the keys and values of the tokens of each site.

        Returns:
          Hidden states, normalized if the config says so, and the memory, empty if it is not requested.
        """
        if own.buckets is not None and self.config.shared_bias:
            own = dataclasses.replace(own, biases=tuple(bias_of(self.relative_bias, b) for b in own.buckets))
        if self.config.positions == "learned":
            x = x + jnp.take(self.position_embedding, places, axis=0, mode="clip").astype(x.dtype)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        block, sites = self._block(), (own, cross)
        prefixes, caches = ([None if site is None else getattr(site, name) for site in sites] for name in _BY_LAYER)

        def layer(x: Array, given: Any) -> tuple[Array, Any]:
            index, params, prefix = given
            cache = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), caches)
            of_layer = [
                site and dataclasses.replace(site, prefix=one, cache=two)
                for site, one, two in zip(sites, prefix, cache, strict=True)
            ]
            x, kept = block.apply({"params": params}, x, *of_layer)
            return x, kept if return_memory else {}

        run = jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[self.remat])
        count = jax.tree.leaves(self.layers)[0].shape[0]
        x, memory = jax.lax.scan(run, x, (jnp.arange(count), self.layers, prefixes))
        return self.final_norm(x) if self.config.final_norm else x, memory

    def cross_memory(self, encoded: Float[Array, "B T D"]) -> Memory:
        """Returns the keys and values [L, B, T, K, H] of the encoder's tokens for cross-attention."""
        block = self._block()

        def of_layer(params: Any) -> Any:
            return block.apply({"params": params}, encoded, method=SideBlock.cross_memory)

        return {CROSS: jax.lax.map(of_layer, self.layers)}


_BY_LAYER = ("prefix", "cache")
