"""Log-probabilities of the tokens of a prompt, for requests with `echo`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import bucket
from spt_jax.inference.decoding import likeliest
from spt_jax.inference.forward import run_stream
from spt_jax.inference.generation import BUCKET
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.model import Model
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import to_host
from spt_jax.serving.bank import NOTHING, Entry, hold, overflow


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Scores of given tokens under a base.

    Attributes:
      log_probabilities: of each token given the tokens before it; NaN for the first token.
      alternatives: for each token, the likeliest ids in its place and their log-probabilities; empty for the first.
    """

    log_probabilities: list[float]
    alternatives: list[dict[int, float]]


def score_tokens(base: FrozenBase, name: str | None, entry: Entry, ids: np.ndarray, alternatives: int) -> TokenScores:
    """Scores all ids of a prompt in one pass.

    Args:
      base: the frozen base.
      name: the name of the soft prompt; None for the bare base.
      entry: the soft prompt whose virtual ids are among `ids`.
      ids: real and virtual ids, which must fit the positions of the base.
      alternatives: how many of the likeliest ids to return per token.

    Raises:
      ConfigError: values overflow the base's dtype.
    """
    # The whole prompt runs here, because the server has no hidden states of the shared leading ids.
    held = NOTHING if entry.virtual is None else hold(base, entry.virtual, np.zeros(0, np.int32))
    padded = np.zeros(bucket(len(ids), BUCKET), np.int32)
    padded[: len(ids)] = ids
    inputs = held.virtual, held.prefix, padded, np.int32(len(ids)), np.int32(held.start), np.asarray(alternatives > 0)
    values, found = jax.tree.map(to_host, _scores(base.model, *inputs))
    scores = values[: len(ids)].astype(float)
    scores[0] = np.nan
    if not np.isfinite(scores[1:]).all():
        raise overflow(base, name)
    likely = [
        dict(zip(top_ids.tolist(), top_values.tolist(), strict=True)) if index else {}
        for index, (top_ids, top_values) in enumerate(zip(*(a[: len(ids), :alternatives] for a in found), strict=True))
    ]
    return TokenScores(scores.tolist(), likely)


@jax.jit
def _scores(
    model: Model,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    ids: Int[Array, " T"],
    length: Int[Array, ""],
    start: Int[Array, ""],
    wanted: Bool[Array, ""],
) -> tuple[Float[Array, " T"], tuple[Int[Array, "T A"], Float[Array, "T A"]]]:
    """Returns the log-probability of each id given those before it, and the likeliest ids; the first row is unused."""
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
    real = (places < length).astype(jnp.int32)
    stream = Stream(start + places, real, jnp.zeros_like(places))
    hidden, _ = run_stream(model, virtual, ids[None], stream, prefix)

    def part(inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Scores a few positions, so that the logits of all positions are never in memory at once."""
        states, targets = inputs
        scores = model.logits(states)
        # A virtual id has no score and is never echoed.
        targets = jnp.where(targets < scores.shape[1], targets, 0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), targets[:, None], axis=1)[:, 0]
        return chosen, likeliest(scores, wanted)

    before = jnp.roll(hidden[0], 1, axis=0)  # the hidden state that predicts each id
    parts = jax.tree.map(lambda array: array.reshape(-1, BUCKET, *array.shape[1:]), (before, ids))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), jax.lax.map(part, parts))
