"""Pairs of answers with random ids, and the losses of pairs as the papers write them, in torch or NumPy."""

import numpy as np

from spt_jax.data.examples import Example
from tests.examples import HEAD, INNER, VOCAB


def random_pairs(count: int, seed: int = 0) -> list[Example]:
    """Pairs whose answers have 1 to 5 ids and begin with the same id; virtual tokens stand in two places."""
    random = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        text = random.integers(3, VOCAB, 2 + index % 4)
        ids = np.concatenate([HEAD, text, INNER, [7]]).astype(np.int32)
        sizes = [(3, 1), (2, 5), (4, 4)][index % 3]
        answers = tuple(np.append(40, random.integers(41, VOCAB, size - 1)).astype(np.int32) for size in sizes)
        if sizes[1] == 1:
            answers = answers[0], np.asarray([41], np.int32)
        pairs.append(Example(ids, np.zeros(len(ids), bool), answers, 0, index))
    return pairs


def paper_loss(name, options, values, lengths, reference, library):
    """The losses [N] as in the papers, from log-probabilities [N, 2] of chosen and rejected answers.

    library: torch or numpy; both have log, exp and sigmoids made of them.
    """

    def log_sigmoid(margin):
        return -library.log(1 + library.exp(-margin))

    (w, x), (n, m), (a, b) = values.T, lengths.T, reference.T
    if name == "dpo":
        h = options["beta"] * (w - a) - options["beta"] * (x - b)
        noise = options.get("label_smoothing", 0.0)
        return -(1 - noise) * log_sigmoid(h) - noise * log_sigmoid(-h)
    if name == "ipo":
        return ((w - x) - (a - b) - 1 / (2 * options["beta"])) ** 2
    if name == "simpo":
        return -log_sigmoid(options["beta"] / n * w - options["beta"] / m * x - options["gamma"])
    odds = [library.exp(mean) / (1 - library.exp(mean)) for mean in (w / n, x / m)]
    return -w / n - options["strength"] * log_sigmoid(library.log(odds[0] / odds[1]))
