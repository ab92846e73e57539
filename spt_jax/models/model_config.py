"""The configs of the architectures of this library."""

from spt_jax.models.config import DecoderConfig
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig

ModelConfig = DecoderConfig | EncoderDecoderConfig
