"""PEFT's prefixes of encoder-decoders, which act on the decoder's self-attention only, and not layer by layer.

PEFT (0.21) stores keys and values for L layers, repeats them, and gives layer l the arrays 4l and 4l + 1 of the result:
those of layer 2l modulo L. The others would be those of cross-attention, which PEFT drops. With an odd L all layers get
different ones. With an even L, half of what is stored is never used, and layers L/2 apart get the same.
"""

import numpy as np
from jaxtyping import Float

from spt_jax.bases.base import FrozenBase
from spt_jax.errors import ConfigError

# The families for which a prefix moves tokens in PEFT as it does here. BART's positions count the prefix in PEFT only.
FAMILIES = ("t5", "mt5", "umt5")


def check_family(base: FrozenBase) -> None:
    """Checks that a prefix of the decoder's self-attention is the same function in PEFT as here.

    Args:
      base: an encoder-decoder.

    Raises:
      ConfigError: it is not, or not known to be.
    """
    if base.family not in FAMILIES:
        raise ConfigError(
            f"prefixes of {base.name} ({base.family}) are not exchanged with PEFT, which may give its tokens other"
            f" positions after a prefix; those of {', '.join(FAMILIES)} are"
        )


def used_layers(stored: int, layers: int) -> list[int]:
    """Returns for each of the decoder's layers which of the stored ones PEFT gives it.

    Args:
      stored: the number of layers for which keys and values are stored; PEFT takes that of the encoder by default.
      layers: the number of layers of the decoder, at most as many.
    """
    return [2 * layer % stored for layer in range(layers)]


def from_stored(stored: Float[np.ndarray, "S P K H"], layers: int) -> Float[np.ndarray, "L P K H"]:
    """Returns what each layer of the decoder gets of stored keys or values.

    Args:
      stored: the stored ones.
      layers: the number of layers of the decoder.
    """
    return stored[used_layers(len(stored), layers)]


def to_stored(layers: Float[np.ndarray, "L P K H"]) -> Float[np.ndarray, "L P K H"]:
    """Returns keys or values to store, so that each layer of the decoder gets its own. What PEFT never uses is 0.

    Args:
      layers: those of the decoder's layers.

    Raises:
      ConfigError: layers that PEFT gives the same ones have different ones.
    """
    used = used_layers(len(layers), len(layers))
    stored = np.zeros_like(layers)
    stored[used] = layers
    if not np.array_equal(stored[used], layers):
        raise ConfigError(
            f"PEFT gives layers {len(layers) // 2} apart of a decoder with {len(layers)} layers the same keys and"
            " values, and this prompt has different ones"
        )
    return stored
