"""The shape of a convolution over the tokens of an encoder."""

import dataclasses
from typing import Literal

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionConfig:
    """A convolution of the input of a layer, whose result is added to the output of the layer (DeBERTa-v2).

    Attributes:
      size: the number of tokens that it reads for each, an odd number.
      activation: of its result.

    Raises:
      ConfigError: the size is even or below 1.
    """

    size: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh"]

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0:
            raise ConfigError(f"a convolution over {self.size} tokens is not supported; their number must be odd")
