"""Static facts about a base: its sizes, and what its layers remember."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

# The group of the self-attention of a plain decoder. In files, its name is left out.
SELF = "self"
# The group of the states of layers that have a recurrent part beside the attention of that group.
RECURRENT = "recurrent"
# The groups of an encoder-decoder beside the self-attention of its decoder: cross-attention, whose keys and values are
# computed from the encoder's output, and the self-attention of the encoder.
CROSS = "cross"
ENCODER = "encoder"


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers at one attention site whose keys and values have the same shape.

    Attributes:
      layers: indices of the layers, ascending.
      kv_heads: number K of key and value heads.
      key_size: size of a key.
      value_size: size of a value.
      site: "self" for self-attention; "cross" for cross-attention to the encoder's tokens, and "encoder" for the
        self-attention of an encoder that a decoder follows; "inputs" if the keys are the input embeddings of the
        tokens, and there are no values, for a model that recomputes its layers from them.
    """

    layers: tuple[int, ...]
    kv_heads: int
    key_size: int
    value_size: int
    site: Literal["self", "cross", "encoder", "inputs"] = "self"


@dataclasses.dataclass(frozen=True)
class StateGroup:
    """Recurrent layers whose states have the same shapes.

    Attributes:
      layers: indices of the layers, ascending.
      shapes: the name and the shape of each array of the state of one layer and one row.
    """

    layers: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static facts of a base that prompts, storage and serving depend on.

    Attributes:
      vocab_size: number V of real token ids; virtual token i has the id V + i.
      width: size D of an embedding.
      max_positions: the longest sequence.
      groups: the layers that remember something, by name; a plain decoder has one group, "self". A layer that has both
        attention and a recurrent part is in two.
      windowed: whether some layers have a sliding window.
      packs: whether rows of several examples save time; the results are the same in either case.
      causal: whether a token sees only earlier tokens, so that the hidden states of leading tokens that all examples
        share depend on no example, and text can be generated. Otherwise the base is an encoder, or has one that reads
        the prompt.
      pooling: what a class head reads, as in `DecoderConfig`.
      predicts_tokens: whether the base has an output matrix, and so logits.
      hidden_width: size of a hidden state; None if it is that of an embedding.
      layer_count: number L of layers whose hidden states a prompt can edit; 0 if it cannot.
      layer_width: size of their hidden states.
      start_id: of an encoder-decoder, the token that begins the decoder's tokens; None for a base with one side.
      forced_id: of an encoder-decoder, the first token of every answer, after `start_id`; None if the model chooses it.
    """

    vocab_size: int
    width: int
    max_positions: int
    groups: Mapping[str, Group | StateGroup]
    windowed: bool = False
    packs: bool = True
    causal: bool = True
    pooling: Literal["last", "first", "mean"] = "last"
    predicts_tokens: bool = True
    hidden_width: int | None = None
    layer_count: int = 0
    layer_width: int = 0
    start_id: int | None = None
    forced_id: int | None = None

    def __hash__(self) -> int:
        sizes = self.vocab_size, self.width, self.max_positions, self.hidden_width, self.start_id, self.forced_id
        kinds = self.windowed, self.packs, self.causal, self.pooling, self.predicts_tokens
        return hash((*sizes, frozenset(self.groups.items()), *kinds))

    @property
    def encodes(self) -> bool:
        """Whether this is an encoder-decoder, whose encoder reads the prompt."""
        return self.start_id is not None

    @property
    def generates(self) -> bool:
        """Whether the base can generate text."""
        return self.causal or self.encodes

    @property
    def head_width(self) -> int:
        """The size of a hidden state, which a task head reads."""
        return self.hidden_width or self.width

    @property
    def attention_groups(self) -> dict[str, Group]:
        """The groups with keys and values of attention layers, which a prompt may provide."""
        own = {name: group for name, group in self.groups.items() if isinstance(group, Group)}
        return {name: group for name, group in own.items() if group.site != "inputs"}

    @property
    def cached_groups(self) -> dict[str, Group | StateGroup]:
        """The groups whose memory later tokens read: all but the self-attention of an encoder."""
        groups = self.groups.items()
        return {name: group for name, group in groups if not isinstance(group, Group) or group.site != "encoder"}

    @property
    def only_tokens(self) -> bool:
        """Whether a prompt can consist of input embeddings only, because no layer takes keys and values or states."""
        return not self.attention_groups and not self.state_groups

    @property
    def state_groups(self) -> dict[str, StateGroup]:
        """The groups of recurrent layers."""
        return {name: group for name, group in self.groups.items() if isinstance(group, StateGroup)}

    @property
    def attention_layers(self) -> list[int]:
        """The indices of the layers with keys and values, ascending."""
        return sorted(layer for group in self.attention_groups.values() for layer in group.layers)


def only_layers(groups: Mapping[str, Group], layers: Sequence[int]) -> dict[str, Group]:
    """Returns the groups without the layers that are not among `layers`, and without groups that have none of them."""
    chosen = frozenset(layers)
    kept = {
        name: dataclasses.replace(group, layers=tuple(layer for layer in group.layers if layer in chosen))
        for name, group in groups.items()
    }
    return {name: group for name, group in kept.items() if group.layers}
