"""The encoder-decoders whose logits are stored, and the example that they are of."""

from pathlib import Path

import numpy as np

from tests.encoder_decoders import VARIANTS, words

GOLDEN = Path(__file__).parent / "encoder_decoders.safetensors"
CASES = VARIANTS
SEED = 3
PROMPT, TARGET = words(30, 1), words(22, 2)
KEPT = (0, 1, 6, 7, 14, 21)  # places in the target whose logits are stored


def kept(logits: np.ndarray) -> np.ndarray:
    """Returns what is stored of the logits [M, V] that predict the target."""
    return np.ascontiguousarray(logits[list(KEPT)])
