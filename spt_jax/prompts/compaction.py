"""Compacts the keys and values of a text to fewer positions in closed form, by attention matching (arXiv 2602.16284).

For each key/value head, a subset of the keys is kept: those that reference queries attend to most. Their values are
then fitted by least squares, so that the outputs of attention for these queries stay the same. The reference queries
are those of pieces of the text that follow the text once more.

Of the paper, this has the selection by attention (root mean square over the queries) and the fit of values. It has no
biases of the kept keys, since a prefix has none; the fit therefore also corrects for the attention that the kept keys
lose to later tokens. Budgets are equal for all heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.layout import SELF
from spt_jax.models.memory import KeysValues, Memory
from spt_jax.models.rope import RopeConfig, rotate

# Pieces of the text that give the reference queries, and the most tokens of each.
_PIECES, _PIECE = 4, 128
# Weight of the kept values in the fit, in units of the mean square attention to a kept key.
_RIDGE = 0.3


def check_compactable(base: FrozenBase) -> None:
    """Checks that keys of a base can be moved to other positions, and its attention computed from queries and keys.

    Args:
      base: the frozen base.

    Raises:
      ConfigError: they cannot.
    """
    reason = None
    if not isinstance(base.model, DecoderModel) or list(base.layout.groups) != [SELF]:
        reason = "its layers are of several kinds"
    elif base.config.rope is None or base.config.rope.query_beta or base.config.no_rope_layers:
        reason = "not all of its layers have RoPE"
    elif base.layout.windowed:
        reason = "it has sliding windows"
    elif base.config.latent is not None or base.config.sinks or base.config.score_cap or base.config.variants:
        reason = "its attention has latents, sinks, soft caps or layers of different sizes"
    elif base.config.qk_norm_after_rope:
        reason = "it normalizes keys after RoPE"
    if reason is not None:
        raise ConfigError(f"the text of {base.name} cannot be compacted, because {reason}; leave tokens out")


def compact(base: FrozenBase, ids: Int[np.ndarray, " P"], memory: Memory, count: int) -> Memory:
    """Returns keys and values at `count` positions that take the place of those of a text.

    Keys are rotated so that the tokens after the `count` positions are as far from them as from those of the text.

    Args:
      base: the frozen base, which `check_compactable` accepts.
      ids: the text's ids.
      memory: its keys and values, float32.
      count: the number of positions, fewer than those of the text.

    Returns:
      The keys and values, float32.
    """
    length = min(_PIECE, len(ids))
    starts = np.linspace(0, len(ids) - length, _PIECES).astype(int)
    rows = jnp.asarray(np.stack([ids[start : start + length] for start in starts]))
    assert isinstance(base.model, DecoderModel)
    config = base.config
    scale = config.score_scale or config.head_size**-0.5
    own = memory[SELF]
    assert isinstance(own, KeysValues) and config.rope is not None
    kept = _compacted(base.model, rows, own, count, scale)
    return {SELF: KeysValues(moved(kept.keys, config.rope, count - len(ids)), kept.values)}


@functools.partial(jax.jit, static_argnames=("count", "scale"))
def _compacted(model: DecoderModel, ids: Int[Array, "B T"], text: KeysValues, count: int, scale: float) -> KeysValues:
    """Returns the kept keys, not moved, and their fitted values."""
    length = text.keys.shape[1]
    positions = jnp.broadcast_to(length + jnp.arange(ids.shape[1]), ids.shape)
    stream = Stream(positions, jnp.ones_like(ids), jnp.zeros_like(ids), ids=ids)
    prefix = Prefix({SELF: text}, jnp.arange(length))
    x = model.embed(ids)
    queries = model.queries(x, stream, prefix)
    _, found = model.run(x, stream, prefix, return_memory=True, return_hidden=False)
    assert found is not None
    rows = found[SELF]
    assert isinstance(rows, KeysValues)
    rows = jax.tree.map(lambda array: array.astype(jnp.float32), rows)
    fit = functools.partial(_of_layer, count=count, scale=scale)
    return KeysValues(*jax.lax.map(lambda own: fit(*own), (queries, text.keys, text.values, rows.keys, rows.values)))


def _of_layer(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "P K H"],
    values: Float[Array, "P K Hv"],
    row_keys: Float[Array, "B T K H"],
    row_values: Float[Array, "B T K Hv"],
    *,
    count: int,
    scale: float,
) -> tuple[Float[Array, "C K H"], Float[Array, "C K Hv"]]:
    heads = keys.shape[1]
    queries = scale * queries.reshape(*queries.shape[:2], heads, -1, queries.shape[-1])
    later = jnp.tril(jnp.ones((queries.shape[1], queries.shape[1]), bool))
    own = jnp.einsum("btkgh,bskh->kbgts", queries, row_keys)
    own = jnp.where(later[None, None, None], own, -jnp.inf)
    text = jnp.einsum("btkgh,pkh->kbgtp", queries, keys)
    most = jnp.maximum(own.max(-1), text.max(-1))[..., None]
    own, text = jnp.exp(own - most), jnp.exp(text - most)
    own_values = jnp.einsum("kbgts,bskh->kbgth", own, row_values).reshape(heads, -1, row_values.shape[-1])
    own_mass = own.sum(-1).reshape(heads, -1)
    text = text.reshape(heads, -1, text.shape[-1])
    fit = functools.partial(_of_head, count=count)
    keys, values = jax.vmap(fit)(text, keys.swapaxes(0, 1), values.swapaxes(0, 1), own_mass, own_values)
    return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def _of_head(
    text: Float[Array, "R P"],
    keys: Float[Array, "P H"],
    values: Float[Array, "P Hv"],
    own_mass: Float[Array, " R"],
    own_values: Float[Array, "R Hv"],
    *,
    count: int,
) -> tuple[Float[Array, "C H"], Float[Array, "C Hv"]]:
    """Selects keys of one head and fits their values, for R reference queries with these unnormalized weights."""
    total = (text.sum(-1) + own_mass)[:, None]
    weights = text / total
    chosen = jnp.sort(jax.lax.top_k(jnp.square(weights).sum(0), count)[1])
    expected = weights @ values + own_values / total
    left = (text[:, chosen].sum(-1) + own_mass)[:, None]
    inputs, start = text[:, chosen] / left, values[chosen]
    missing = expected - own_values / left - inputs @ start
    square = inputs.T @ inputs
    ridge = _RIDGE * jnp.trace(square) / count
    change = jax.scipy.linalg.solve(square + ridge * jnp.eye(count), inputs.T @ missing, assume_a="pos")
    return keys[chosen], start + change


def moved(keys: Float[Array, "L C K H"], rope: RopeConfig, steps: int) -> Float[Array, "L C K H"]:
    """Returns keys as they are at positions `steps` later.

    Args:
      keys: the keys after RoPE; rotations add up, and a scale of the rotation stays as it is.
      rope: the config of the rotation.
      steps: the number of positions; may be negative.
    """
    angles = steps * jnp.asarray(rope.inverse_frequencies(keys.shape[-1]), jnp.float32)
    shape = (*keys.shape[:2], angles.shape[0])
    cos_sin = jnp.broadcast_to(jnp.cos(angles), shape), jnp.broadcast_to(jnp.sin(angles), shape)
    return rotate(keys, cos_sin, interleaved=rope.interleaved)
