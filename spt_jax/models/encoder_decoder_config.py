"""The shape of an encoder-decoder."""

import dataclasses
import math
from typing import Literal

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """What defines the function of an encoder-decoder of T5's kind (Raffel et al. 2020, arXiv 1910.10683).

    Sizes follow the letters of the array dimensions: V `vocab_size`, D `width`, N `heads`, H `head_size`. Layers
    normalize the input of attention and MLP, linear maps have no bias, and attention scores are not scaled.

    Attributes:
      encoder_layers, decoder_layers: the number of layers of each side.
      start_id: the token that begins the decoder's tokens.
      bias_buckets: the number of buckets of the relative position biases.
      bias_max_distance: the distance from which on all are in the last bucket.
      shared_bias: whether the layers of a side share one table of biases; otherwise each has its own.
      output_scale: factor of the hidden states that the output matrix reads; None for none.
      tied: whether the output matrix is the embedding table.
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
    norm_epsilon: float = 1e-6
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
        if not 0 <= self.start_id < self.vocab_size:
            raise ConfigError(f"start_id is {self.start_id}; it must be the id of one of the {self.vocab_size} tokens")
        if self.bias_buckets < 4 or self.bias_buckets % 4:
            raise ConfigError(f"bias_buckets is {self.bias_buckets}; it must be a multiple of 4")
        if not self.bias_buckets // 2 < self.bias_max_distance < math.inf:
            raise ConfigError(
                f"bias_max_distance is {self.bias_max_distance}; it must exceed half of the {self.bias_buckets} buckets"
            )
        _ = self.layer

    @property
    def layers(self) -> int:
        """The number of layers of both sides."""
        return self.encoder_layers + self.decoder_layers

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
            kv_heads=self.heads,
            head_size=self.head_size,
            mlp_width=self.mlp_width,
            max_positions=self.max_positions,
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            gated_mlp=self.gated_mlp,
            positions="none",
            score_scale=1.0,
            tied=self.tied,
        )
