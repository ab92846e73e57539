"""The shape of a Mamba-2 layer."""

import dataclasses
import math
from typing import Literal

from spt_jax.errors import ConfigError

# Tokens that a layer computes together; in longer rows, a state is passed from chunk to chunk.
CHUNK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """What defines the function of `Mamba2`.

    Attributes:
      heads: heads of values.
      groups: heads of queries and keys, which divide `heads`; consecutive value heads share a query and a key.
      head_size: size of a value.
      state_size: size of a query and of a key.
      convolution_width: tokens that the causal convolution reads, the current one included.
      convolution_bias: whether the convolution has a bias.
      input_bias: whether the linear maps of the input have biases.
      output_bias: whether that of the output has one.
      norm: what follows the recurrence: the RMSNorm of its output times SiLU(gate) ("gate_first"), that norm times
        SiLU(gate) ("gate_last"), or only the product ("none"). The values of each group are normalized together.
      norm_epsilon: epsilon of that norm.
      beside_attention: whether the layer also has attention, which reads the same input; both outputs are added.
      input_scale: factor of the input.
      part_scales: factors of the gate, the values, the keys, the queries and the steps, before the convolution.
      output_scale: factor of the output.

    Raises:
      ConfigError: a number is out of its range, or `groups` does not divide `heads`.
    """

    heads: int
    groups: int
    head_size: int
    state_size: int
    convolution_width: int = 4
    convolution_bias: bool = True
    input_bias: bool = False
    output_bias: bool = False
    norm: Literal["gate_first", "gate_last", "none"] = "gate_first"
    norm_epsilon: float = 1e-5
    beside_attention: bool = False
    input_scale: float = 1.0
    part_scales: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        least = {"heads": 1, "groups": 1, "head_size": 1, "state_size": 1, "convolution_width": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"Mamba-2: {name} is {getattr(self, name)}; it must be at least {smallest}")
        if self.heads % self.groups:
            raise ConfigError(f"Mamba-2: {self.heads} heads cannot be divided into {self.groups} equal groups")
        if len(self.part_scales) != 5:
            raise ConfigError(f"Mamba-2: part_scales are {len(self.part_scales)} numbers; they must be 5")
        for name in ("norm_epsilon", "input_scale", "part_scales", "output_scale"):
            value = getattr(self, name)
            if not all(math.isfinite(n) and n > 0 for n in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"Mamba-2: {name} is {value}; it must be finite and above 0")

    @property
    def value_width(self) -> int:
        """Size of the values of all heads."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Size of the queries, or keys, of all groups."""
        return self.groups * self.state_size

    @property
    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The name and the shape of each array of the state of one layer and one row, as in `StateGroup`."""
        channels = self.value_width + 2 * self.key_width
        return (
            ("convolution", (self.convolution_width - 1, channels)),
            ("recurrent", (self.heads, self.head_size, self.state_size)),
        )

    def matmul_parameters(self, width: int) -> int:
        """Returns the parameters of one layer that every token is multiplied with, for a model of width D."""
        return width * (3 * self.value_width + 2 * self.key_width + self.heads)
