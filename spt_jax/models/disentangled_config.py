"""The shape of disentangled attention."""

import dataclasses

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisentangledConfig:
    """Attention scores with terms for the distance between tokens (DeBERTa, He et al. 2021, arXiv 2006.03654).

    Each distance has an embedding. The score of a query and a key is the sum of their product, of the product of the
    query and the key of the distance, and of that of the key and the query of the distance.

    Attributes:
      span: number of embeddings for distances to earlier tokens, and of those for the others.
      max_distance: the distance from which on all share the last embedding; without `logarithmic`, it is the span.
      logarithmic: whether half of the embeddings on each side are for one distance each, the others for logarithmic
        ranges up to `max_distance`. Otherwise each is for one distance.
      content_to_position: whether scores have the product of the query and the key of the distance.
      position_to_content: whether scores have the product of the key and the query of the distance.
      shared: whether distances have the maps to queries and keys of tokens; otherwise they have their own.
      normed: whether the embeddings are normalized.

    Raises:
      ConfigError: a number is too small, or the scores have no term for distances.
    """

    span: int
    max_distance: int
    logarithmic: bool
    content_to_position: bool
    position_to_content: bool
    shared: bool
    normed: bool

    def __post_init__(self) -> None:
        if self.span < 1 or (self.logarithmic and self.span < 4):
            raise ConfigError(f"disentangled attention: {self.span} embeddings of distances are too few")
        if self.logarithmic and self.max_distance - 1 <= self.span // 2:
            raise ConfigError(
                f"disentangled attention: max_distance is {self.max_distance}; it must be above {self.span // 2 + 1}"
            )
        if not (self.content_to_position or self.position_to_content):
            raise ConfigError("disentangled attention: the scores have no term for distances")

    @property
    def terms(self) -> int:
        """The number of terms for distances in a score."""
        return self.content_to_position + self.position_to_content
