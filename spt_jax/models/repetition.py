"""Finds repeating sequences."""

import math
from collections.abc import Hashable, Sequence

MAX_PERIOD = 64  # The longest sequence that is looked for.


def longest_repetition(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """Returns the length of the first sequence and how often it repeats, such that both cover the most layers."""
    best = 1, 1
    for size in range(1, min(len(kinds) // 2, MAX_PERIOD) + 1):
        repeats = 1
        while kinds[repeats * size : (repeats + 1) * size] == kinds[:size]:
            repeats += 1
        if repeats > 1 and size * repeats > math.prod(best):
            best = size, repeats
    return best
