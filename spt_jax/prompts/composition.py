"""Prefixes one after the other: the keys of each are moved to the positions after those before it.

Each part keeps what it was computed or trained for: its values stay as they are, and its keys are rotated to their new
positions. No part attends to an earlier one, so the result is not the prefix of the joint text, except in bases of one
layer. Eyuboglu et al. 2025 (arXiv 2506.06266) compose trained prefixes in this way, without training them together.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.config import DecoderConfig, layer_configs
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.memory import KeysValues, Memory
from spt_jax.prompts.compaction import moved


def check_composable(base: FrozenBase) -> None:
    """Checks that keys of a base can be moved to other positions.

    Args:
      base: the frozen base.

    Raises:
      ConfigError: they cannot.
    """
    reason = None
    if not isinstance(base.model, DecoderModel) or not base.layout.causal:
        reason = "it is not a decoder of this package"
    elif base.layout.state_groups:
        reason = "its recurrent layers have one state, which cannot hold two texts"
    elif base.config.learned_positions:
        reason = "its keys and values contain learned positions, which cannot be moved"
    elif base.config.qk_norm_after_rope:
        reason = "it normalizes keys after RoPE"
    if reason is not None:
        raise ConfigError(f"prefixes of the base {base.name} cannot be composed: {reason}")


def composed(base: FrozenBase, parts: Sequence[Memory], skip: int = 0) -> Memory:
    """Returns the keys and values of prefixes one after the other.

    Args:
      base: the frozen base, which `check_composable` accepts.
      parts: the keys and values of each prefix [L, P, K, H], each computed at the positions from 0 on.
      skip: the number of positions left out at the start of every part but the first, such as its BOS token.

    Returns:
      The keys and values at the positions of all parts, in their order.

    Raises:
      ConfigError: there are no parts, or one has no more positions than are left out.
    """
    if not parts:
        raise ConfigError("there are no prefixes to compose")
    found = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        if not 0 <= skip < memory.length(part):
            raise ConfigError(
                f"skip is {skip}, and prefix {number} has {memory.length(part):,} positions, of which at least one must"
                " be left; it must be 0 or more"
            )
        steps = memory.length(found) - skip
        kept = {
            name: KeysValues(
                _moved(base.config, base.layout.attention_groups[name].layers, own.keys[:, skip:], steps),
                own.values[:, skip:],
            )
            for name, own in part.items()
            if isinstance(own, KeysValues)
        }
        found = memory.concatenate(found, kept)
    return found


def _moved(
    config: DecoderConfig, layers: Sequence[int], keys: Float[Array, "L P K H"], steps: int
) -> Float[Array, "L P K H"]:
    """Returns the keys of some layers as they are `steps` positions later."""
    return jnp.stack([_moved_in_layer(config, layer, own, steps) for layer, own in zip(layers, keys, strict=True)])


def _moved_in_layer(
    config: DecoderConfig, layer: int, keys: Float[Array, "P K H"], steps: int
) -> Float[Array, "P K H"]:
    own = layer_configs(config)[layer]
    windowed = layer in config.window_layers and own.local_rope is not None
    rope = own.local_rope if windowed else own.rope
    if rope is None or layer in config.no_rope_layers:
        return keys
    plain = 0 if own.latent is None else own.latent.rank
    turned = moved(keys[None, ..., plain:], rope, steps)[0]
    return jnp.concatenate([keys[..., :plain], turned], axis=-1)
