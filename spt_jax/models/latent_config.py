"""The shape of latent attention."""

import dataclasses
import math

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """What defines the function of `LatentAttention`.

    Attributes:
      rank: size of the latent that keys and values of all heads are computed from.
      query_rank: size of the latent of the queries; None if these are a linear map of the input.
      plain_size: size of the part of a query and a key without RoPE.
      rotated_size: size of the part with RoPE, whose key all heads share; the decoder's `head_size`.
      value_size: size of a value.
      norm_epsilon: epsilon of the norms of the latents.

    Raises:
      ConfigError: a number is too small.
    """

    rank: int
    query_rank: int | None
    plain_size: int
    rotated_size: int
    value_size: int
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("rank", "query_rank", "plain_size", "rotated_size", "value_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"latent attention: {name} is {value}; it must be at least 1")
        if not (math.isfinite(self.norm_epsilon) and self.norm_epsilon > 0):
            raise ConfigError(f"latent attention: norm_epsilon is {self.norm_epsilon}; it must be a number above 0")

    @property
    def key_size(self) -> int:
        """Size of what the layer remembers of a token as its key: the latent and the rotated part."""
        return self.rank + self.rotated_size

    def matmul_parameters(self, width: int, heads: int) -> int:
        """Returns the parameters of one layer that every token is multiplied with, for a model of width D."""
        query = heads * (self.plain_size + self.rotated_size)
        queries = width * query if self.query_rank is None else self.query_rank * (width + query)
        up = heads * self.rank * (self.plain_size + self.value_size)
        return queries + width * self.key_size + up + width * heads * self.value_size
