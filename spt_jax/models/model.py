"""What the library asks of a base: a pytree with the frozen arrays as leaves and everything else static.

`jax.jit(f)(model, ...)` therefore passes the weights as arguments of the compiled program and never bakes them in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from spt_jax.models.attention import Cache, GatedPrefix, LinearMemory, Prefix, Stream
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.layout import Layout
from spt_jax.models.memory import Memory

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetScores:
    """What losses and scores need of the logits, in float32.

    Attributes:
      log_probabilities: the log-probabilities of K ids at each target: the target itself (K = 1), or several.
      means: for each target, the mean log-probability of all V tokens or C classes; None if logits are capped.
      logits: for each target, the logits of a task head's classes; None for a vocabulary.
      divergences: for each target, the KL divergence from a teacher over the whole vocabulary; None without a teacher.
    """

    log_probabilities: Float[Array, "B M K"]
    means: Float[Array, "B M"] | None
    logits: Float[Array, "B M C"] | None = None
    divergences: Float[Array, "B M"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """What a soft prompt is compared with at each target, over the whole vocabulary.

    Attributes:
      states: normalized hidden states of the same model, whose logits are the teacher's.
      temperature: the number that both logits are divided by.
    """

    states: Float[Array, "B M D"]
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})


@runtime_checkable
class Model(Protocol):
    """A base's functions. The arrays are frozen: nothing is differentiated with respect to them."""

    @property
    def layout(self) -> Layout:
        """Static facts about the model."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """The precision that the model computes in."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that splits the weights and activations; None without one."""
        ...

    @property
    def params(self) -> Params:
        """The frozen arrays."""
        ...

    def embed(self, ids: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Returns the input embeddings of real ids, which must be in [0, V).

        Args:
          ids: the ids.
        """
        ...

    def run(
        self,
        x: Float[Array, "B T D"],
        stream: Stream,
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        gated: GatedPrefix | None = None,
        linear: LinearMemory | None = None,
        edits: HiddenEdits | None = None,
        *,
        return_memory: bool = False,
        return_hidden: bool = True,
    ) -> tuple[Float[Array, "B T _"] | None, Memory | None]:
        """Runs the layers.

        Args:
          x: embeddings of real or virtual tokens, without position embeddings.
          stream: positions and segments of the tokens, and their ids, which some bases read again in each layer.
          prefix: memory that all rows share.
          cache: memory of earlier tokens of each row.
          gated: gated keys and values of the last layers.
          linear: maps that add to the output of attention. It is passed only for a prompt that has it.
          edits: edits of the hidden states after each layer, likewise.
          return_memory: also return the memory of the tokens of x.
          return_hidden: if False, the last layer computes only its memory.

        Returns:
          Normalized hidden states for `logits`, and the memory, with keys and values [L, B, T, K, H] and states
          [L, B, ...]; None for either that is not requested.
        """
        ...

    def attention_weights(
        self, x: Float[Array, "B T D"], stream: Stream, prefix: Prefix | None
    ) -> Float[Array, "L B T S"]:
        """Returns each layer's attention weights, averaged over heads, float32, over S keys: prefix, then row.

        Args:
          x: embeddings of the rows' tokens, as for `run`.
          stream: their positions, segments and ids.
          prefix: memory that all rows share.
        """
        ...

    def embedding_table(self) -> Float[np.ndarray, "V D"]:
        """Returns the input embedding of every id, float32, on the host."""
        ...

    def gated_memory(self, rows: Float[Array, "G P D"]) -> Memory:
        """Returns the keys and values that the last G layers compute from rows without a position, float32.

        Args:
          rows: P rows for each of the last G layers.
        """
        ...

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns next-token logits, float32.

        Args:
          hidden: normalized hidden states, as from `run`.
        """
        ...

    def scores(self, states: Float[Array, "B Q D"], at: Int[Array, "B M"], ids: Int[Array, "B M K"]) -> TargetScores:
        """Returns the scores of K ids per target, each at an index into Q; for a large V, without all logits.

        Args:
          states: normalized hidden states at Q positions.
          at: for each of M targets, the index of its state.
          ids: for each target, the K ids to score.
        """
        ...
