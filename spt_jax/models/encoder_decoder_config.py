"""The shape of an encoder-decoder."""

import dataclasses
import math
from typing import Literal

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """What defines the function of an encoder-decoder. Defaults are those of T5 (Raffel et al. 2020, arXiv 1910.10683).

    Sizes follow the letters of the array dimensions: V `vocab_size`, D `width`, N `heads`, H `head_size`.

    Attributes:
      encoder_layers, decoder_layers: the number of layers of each side.
      start_id: the token that begins the decoder's tokens.
      forced_id: the first token of every answer, after `start_id`; None if the model chooses it.
      norm: RMSNorm (Zhang & Sennrich 2019) or LayerNorm, which has a bias.
      norm_offset: added to the stored scales of norms.
      norm_place: where a layer normalizes: the input of attention and MLP ("before"), that and their output before the
        residual addition ("around"), or the sum after it ("sum").
      final_norm: whether the output of the last layer of a side is normalized.
      embedding_norm: whether a side normalizes its inputs, after it adds positions.
      embedding_scale: factor of the rows of the embedding table, not of virtual tokens; None for none.
      input_scale: factor of all inputs, virtual tokens among them; None for none.
      decoder_embedding: whether the decoder has an embedding table of its own.
      biases: whether the linear maps of attention and MLP have a bias.
      logit_bias: whether the logits have one.
      score_scale: factor of attention scores.
      score_cap, logit_cap: soft caps of attention scores and logits; None for none.
      kv_heads: the number of heads of keys and values; None if it is `heads`.
      positions: how a side knows positions: by relative biases of attention scores, by a learned table that is added to
        its inputs, or by the rotary embedding `rope` of self-attention.
      local_rope: that of layers with a sliding window, if it differs.
      window: the sliding window's width in tokens of the decoder's self-attention, with the token itself.
      encoder_reach: how many tokens before and after a token its sliding window in the encoder contains.
      encoder_windows, decoder_windows: the layers of each side with a sliding window.
      qk_norm: whether queries and keys of each head are normalized, before RoPE.
      merged: whether a layer of the decoder attends to its own and the encoder's tokens with one softmax, by the same
        linear maps, in place of self- and cross-attention.
      own_row_id: a token whose embedding is a parameter of its own, without `embedding_scale`; None for none.
      bias_buckets: the number of buckets of the relative position biases.
      bias_max_distance: the distance from which on all are in the last bucket.
      shared_bias: whether the layers of a side share one table of biases; otherwise each has its own.
      output_scale: factor of the hidden states that the output matrix reads; None for none.
      tied: whether the output matrix is the embedding table, that of the decoder if it has one.
    """

    family: str
    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int
    mlp_width: int
    max_positions: int
    start_id: int
    forced_id: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    norm_place: Literal["before", "around", "sum"] = "before"
    final_norm: bool = True
    embedding_norm: bool = False
    embedding_scale: float | None = None
    input_scale: float | None = None
    decoder_embedding: bool = False
    biases: bool = False
    logit_bias: bool = False
    score_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    kv_heads: int | None = None
    positions: Literal["relative", "learned", "rope"] = "relative"
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    window: int = 0
    encoder_reach: tuple[int, int] = (0, 0)
    encoder_windows: tuple[int, ...] = ()
    decoder_windows: tuple[int, ...] = ()
    qk_norm: bool = False
    merged: bool = False
    own_row_id: int | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "relu"
    gated_mlp: bool = False
    bias_buckets: int = 32
    bias_max_distance: int = 128
    shared_bias: bool = True
    output_scale: float | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("encoder_layers", "decoder_layers", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("start_id", "forced_id", "own_row_id"):
            id_ = getattr(self, name)
            if id_ is not None and not 0 <= id_ < self.vocab_size:
                raise ConfigError(f"{name} is {id_}; it must be the id of one of the {self.vocab_size} tokens")
        if self.bias_buckets < 4 or self.bias_buckets % 4:
            raise ConfigError(f"bias_buckets is {self.bias_buckets}; it must be a multiple of 4")
        if not self.bias_buckets // 2 < self.bias_max_distance < math.inf:
            raise ConfigError(
                f"bias_max_distance is {self.bias_max_distance}; it must exceed half of the {self.bias_buckets} buckets"
            )
        if (self.positions == "rope") != (self.rope is not None):
            raise ConfigError(
                f"positions are {self.positions!r}; a rope belongs to those that are 'rope', and to no other"
            )
        for side in ("encoder", "decoder"):
            count, windowed = (getattr(self, f"{side}_{name}") for name in ("layers", "windows"))
            if any(not 0 <= layer < count for layer in windowed):
                raise ConfigError(f"{side}_windows names more than the {count} layers")
        if self.decoder_windows and self.window < 1:
            raise ConfigError("layers with a sliding window need window >= 1")
        if min(self.encoder_reach) < 0:
            raise ConfigError(f"encoder_reach is {self.encoder_reach}; both numbers must be at least 0")
        if self.merged and self.relative:
            raise ConfigError("merged attention has no relative position biases; set other positions")
        _ = self.layer

    @property
    def layers(self) -> int:
        """The number of layers of both sides."""
        return self.encoder_layers + self.decoder_layers

    @property
    def window_layers(self) -> tuple[int, ...]:
        """The layers with a sliding window; those of the decoder are numbered after the encoder's."""
        return *self.encoder_windows, *(self.encoder_layers + layer for layer in self.decoder_windows)

    @property
    def relative(self) -> bool:
        """Whether attention scores have relative position biases."""
        return self.positions == "relative"

    @property
    def input_width(self) -> int:
        """The width of an embedding, of a real or a virtual token."""
        return self.width

    @property
    def layer(self) -> DecoderConfig:
        """The sizes of the norms, attentions and MLP of a layer of either side."""
        return DecoderConfig(
            family=self.family,
            vocab_size=self.vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_size=self.head_size,
            mlp_width=self.mlp_width,
            max_positions=self.max_positions,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            norm_offset=self.norm_offset,
            norm_place=self.norm_place,
            embedding_scale=self.embedding_scale,
            qkv_bias=self.biases,
            output_bias=self.biases,
            mlp_bias=self.biases,
            activation=self.activation,
            gated_mlp=self.gated_mlp,
            rope=self.rope,
            local_rope=self.local_rope,
            qk_norm="head" if self.qk_norm else "none",
            positions="none",
            input_scale=self.input_scale,
            score_scale=self.score_scale,
            score_cap=self.score_cap,
            logit_cap=self.logit_cap,
            tied=self.tied,
        )
