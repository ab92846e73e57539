"""The soft prompt as the model sees it: the result of every method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models import memory
from spt_jax.models.attention import GatedPrefix, LinearMemory
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.memory import Memory
from spt_jax.prompts.instance import InstanceGate
from spt_jax.runtime.reprs import short_repr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VirtualPrefix:
    """What all layers remember of the first P positions, which have no tokens.

    Attributes:
      memory: keys (after RoPE) and values [*S L P K H], float32.
      length: number of positions that are not padding, for stacked prompts of different lengths; None for all.
    """

    memory: Memory
    length: Int[Array, "*S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A linear map from hidden states to C classes, used in place of the output matrix; float32."""

    kernel: Float[Array, "*S D C"]
    bias: Float[Array, "*S C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplacedRows:
    """Input embeddings that replace those of some real tokens wherever they occur, float32.

    Attributes:
      rows: the embeddings.
      ids: the id that each replaces, below 2^24; -1 for padding of stacked prompts. They are float32, like all arrays
        of a prompt, which are differentiated and stored as one tree.
    """

    rows: Float[Array, "*S N D"]
    ids: Float[Array, "*S N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VirtualPrompt:
    """A soft prompt as the model sees it. Each part is optional.

    With a leading S axis it holds S stacked prompts, and each row of a batch uses the one of its `Stream.prompt_index`.

    Attributes:
      tokens: row i is the embedding of the virtual token with id `vocab_size + i`, float32.
      replaced: embeddings of some real tokens, in place of the base's.
      shift: added to the embeddings of real tokens at the first T positions.
      prefix: memory of the positions before the first token.
      gated: gated keys and values of the last layers.
      linear: maps of the queries that add to the output of attention.
      edits: low-rank edits of the hidden states after each layer.
      head: task head, used in place of the output matrix.
      instance: networks that adapt the virtual tokens to the input of each example; such prompts cannot be stacked.
      pinned: whether layers with a sliding window never hide the prefix and the virtual tokens from later tokens; for S
        stacked prompts, one for all or one for each.
    """

    tokens: Float[Array, "*S P D"] | None = None
    shift: Float[Array, "*S T D"] | None = None
    prefix: VirtualPrefix | None = None
    gated: GatedPrefix | None = None
    linear: LinearMemory | None = None
    edits: HiddenEdits | None = None
    head: Head | None = None
    replaced: ReplacedRows | None = None
    instance: InstanceGate | None = None
    pinned: bool | tuple[bool, ...] = dataclasses.field(default=False, metadata={"static": True})

    __repr__ = short_repr

    @property
    def prefix_length(self) -> int:
        """Number of positions of the prefix, including padding of stacked prompts; 0 without a prefix."""
        return 0 if self.prefix is None else memory.length(self.prefix.memory)

    @property
    def first_position(self) -> int | Int[Array, "*S"]:
        """Position of the first token after the prefix."""
        if self.prefix is None or self.prefix.length is None:
            return self.prefix_length
        return self.prefix.length


def parts_of(virtual: VirtualPrompt) -> list[str]:
    """Returns the names of the parts that a prompt has, such as "tokens" and "head"."""
    names = (field.name for field in dataclasses.fields(virtual) if field.name != "pinned")
    return [name for name in names if getattr(virtual, name) is not None]


def shape(*sizes: int) -> Any:
    """Returns the shape of a float32 array, as a leaf of `Method.spec`."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)
