"""The shape of a Gated DeltaNet layer."""

import dataclasses
import math

from spt_jax.errors import ConfigError

# Tokens that a layer solves for together; in longer rows, a state is passed from chunk to chunk.
CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """What defines the function of `GatedDeltaNet`.

    Attributes:
      key_heads: heads of queries and keys.
      value_heads: heads of values, a multiple of `key_heads`; consecutive ones share a query and a key.
      key_size: size of a query and of a key.
      value_size: size of a value.
      convolution_width: tokens that the causal convolution reads, the current one included.
      norm_epsilon: epsilon of the norm before the output.

    Raises:
      ConfigError: a number is too small, or `key_heads` does not divide `value_heads`.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    convolution_width: int = 4
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        least = {"key_heads": 1, "value_heads": 1, "key_size": 1, "value_size": 1, "convolution_width": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"Gated DeltaNet: {name} is {getattr(self, name)}; it must be at least {smallest}")
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"Gated DeltaNet: {self.value_heads} value heads cannot share {self.key_heads} key heads evenly"
            )
        if not (math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0):
            raise ConfigError(
                f"Gated DeltaNet: norm_epsilon is {self.norm_epsilon}; it must be a finite number above 0"
            )

    @property
    def key_width(self) -> int:
        """Size of the queries, or keys, of all heads."""
        return self.key_heads * self.key_size

    @property
    def value_width(self) -> int:
        """Size of the values of all heads."""
        return self.value_heads * self.value_size

    @property
    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The name and the shape of each array of the state of one layer and one row, as in `StateGroup`."""
        channels = 2 * self.key_width + self.value_width
        return (
            ("convolution", (self.convolution_width - 1, channels)),
            ("recurrent", (self.value_heads, self.key_size, self.value_size)),
        )

    def matmul_parameters(self, width: int) -> int:
        """Returns the parameters of one layer that every token is multiplied with, for a model of width D."""
        return width * (2 * self.key_width + 3 * self.value_width + 2 * self.value_heads)
