"""The shape of embeddings by layer."""

import dataclasses

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """What defines the function of `PerLayerEmbedding` and `PerLayerInput`.

    Attributes:
      width: size of a token's embedding for one layer.
      vocab_size: number of rows of the table, at least the decoder's.
      virtual_id: id of the row that virtual tokens take, as they have no id of their own.

    Raises:
      ConfigError: a number is out of range.
    """

    width: int
    vocab_size: int
    virtual_id: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"embeddings by layer: width is {self.width}; it must be at least 1")
        if not 0 <= self.virtual_id < self.vocab_size:
            raise ConfigError(
                f"embeddings by layer: virtual_id is {self.virtual_id}; it must be one of the {self.vocab_size} rows"
            )
