"""Log-probabilities of tokens that a client gives, for requests that want their prompt back with its scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spt_jax.bases.base import FrozenBase, logits
from spt_jax.bases.checkpoint import Params
from spt_jax.data.batches import bucket
from spt_jax.inference.decoding import likeliest
from spt_jax.inference.forward import run_stream
from spt_jax.inference.generation import BUCKET
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.decoder import Decoder
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.runtime.sharding import to_host
from spt_jax.serving.bank import NOTHING, Entry, hold, overflow


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What a base says of given tokens.

    Attributes:
      log_probabilities: of each, after those before it; NaN for a first token.
      alternatives: the likeliest ids in the place of each and their log-probabilities; empty for a first token.
    """

    log_probabilities: list[float]
    alternatives: list[dict[int, float]]


def score_tokens(base: FrozenBase, name: str | None, entry: Entry, ids: np.ndarray, alternatives: int) -> TokenScores:
    """Scores all ids of a prompt in one pass.

    Args:
      base: the frozen base.
      name, entry: the soft prompt whose virtual ids are among them.
      ids: real and virtual; no real one follows the positions of the base.
      alternatives: how many of the likeliest ids to find.

    Raises:
      ConfigError: numbers overflow.
    """
    # The whole prompt runs here: of leading ids that are shared, the server keeps no hidden states.
    held = NOTHING if entry.virtual is None else hold(base, entry.virtual, np.zeros(0, np.int32))
    padded = np.zeros(bucket(len(ids), BUCKET), np.int32)
    padded[: len(ids)] = ids
    inputs = held.virtual, held.prefix, padded, np.int32(len(ids)), np.int32(held.start), np.asarray(alternatives > 0)
    values, found = jax.tree.map(to_host, _scores(base.module, base.params, *inputs))
    scores = values[: len(ids)].astype(float)
    scores[0] = np.nan
    if not np.isfinite(scores[1:]).all():
        raise overflow(base, name)
    likely = [
        dict(zip(own_ids.tolist(), own_values.tolist(), strict=True)) if place else {}
        for place, (own_ids, own_values) in enumerate(zip(*(a[: len(ids), :alternatives] for a in found), strict=True))
    ]
    return TokenScores(scores.tolist(), likely)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    module: Decoder,
    frozen: Params,
    virtual: VirtualPrompt | None,
    prefix: Prefix | None,
    ids: Int[Array, " T"],
    length: Int[Array, ""],
    start: Int[Array, ""],
    wanted: Bool[Array, ""],
) -> tuple[Float[Array, " T"], tuple[Int[Array, "T A"], Float[Array, "T A"]]]:
    """The log-probability of each id after those before it, and the likeliest ids there. The first has none."""
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
    real = (places < length).astype(jnp.int32)
    stream = Stream(start + places, real, jnp.zeros_like(places))
    hidden, _ = run_stream(module, frozen, virtual, ids[None], stream, prefix)

    def part(inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Of a few positions, so that the logits of all are never there at once."""
        states, own = inputs
        scores = logits(module, frozen, states)
        # A virtual id has no score, and is never echoed.
        own = jnp.where(own < scores.shape[1], own, 0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), own[:, None], axis=1)[:, 0]
        return chosen, likeliest(scores, wanted)

    before = jnp.roll(hidden[0], 1, axis=0)  # what predicts each id
    parts = jax.tree.map(lambda array: array.reshape(-1, BUCKET, *array.shape[1:]), (before, ids))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), jax.lax.map(part, parts))
