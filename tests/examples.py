"""Examples of every kind with random ids, and the loss of each of them standing alone.

The reference knows neither rows nor prefixes: a sequence is embedded, run through the decoder and read at every
position, one sequence at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.examples import Example
from spt_jax.models.attention import Stream

VOCAB = 320
VIRTUAL = 5
# What all examples begin with: BOS, three virtual tokens, fixed text. The other two virtual tokens stand further on.
HEAD = np.asarray([1, VOCAB, VOCAB + 1, VOCAB + 2, 17, 18], np.int32)
INNER = np.asarray([VOCAB + 3, VOCAB + 4], np.int32)
KINDS = ("target", "spans", "single", "choices")


def random_examples(kind: str, count: int, seed: int = 0, lengths: tuple[int, ...] = (3, 11)) -> list[Example]:
    """Examples that share `HEAD`.

    kind: "target" ends in 1 to 3 ids to predict; "spans" has two runs of them and sometimes text after the last;
      "single" has three choices of one id; "choices" has choices of 1, 2 and 4 ids.
    lengths: of the free text, which go round.
    """
    random = np.random.default_rng(seed)

    def text(length: int) -> np.ndarray:
        return random.integers(3, VOCAB, length).astype(np.int32)

    sizes = (1, 1, 1) if kind == "single" else (1, 2, 4)
    # Choices share a first id, so that scoring the first id alone would not tell them apart.
    firsts = [40 if size > 1 else 41 + i for i, size in enumerate(sizes)]
    choices = tuple(np.append(first, text(n - 1)).astype(np.int32) for first, n in zip(firsts, sizes, strict=True))
    examples = []
    for index in range(count):
        pieces = [(HEAD, False), (text(lengths[index % len(lengths)]), False), (INNER, False)]
        if kind == "target":
            pieces.append((text(1 + index % 3), True))
        elif kind == "spans":
            pieces += [(text(2), True), (text(2), False), (text(1 + index % 2), True), (text(index % 2), False)]
        ids = np.concatenate([ids for ids, _ in pieces])
        predicted = np.concatenate([np.full(len(ids), is_target) for ids, is_target in pieces])
        label = int(random.integers(3)) if kind in ("single", "choices") else 0
        examples.append(Example(ids, predicted, choices if kind in ("single", "choices") else (), label, index))
    return examples


# Tests run a program once or twice: little is gained by optimising it, and much time lost.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def _logits(model, tokens, ids):
    positions = jnp.arange(ids.shape[0])[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
    table = jnp.concatenate([model.embed(jnp.arange(VOCAB)), tokens])
    hidden, _ = model.run(table[ids][None], stream)
    return model.logits(hidden)[0]


_compiled_logits = jax.jit(_logits, compiler_options=QUICK_COMPILE)


def sequence_logits(base: FrozenBase, tokens, ids) -> np.ndarray:
    """Next-token logits [T, V] at every position of one sequence, of which some ids stand for `tokens` [P, D]."""
    return np.asarray(_compiled_logits(base.model, tokens, np.asarray(ids, np.int32)))


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def _score(model, tokens, ids, predicted):
    def total(tokens):
        log_probabilities = jax.nn.log_softmax(_logits(model, tokens, ids)[:-1])
        chosen = jnp.take_along_axis(log_probabilities, ids[1:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(predicted[1:], chosen, 0.0))

    return jax.value_and_grad(total)(tokens)


def sequence_score(base: FrozenBase, tokens, ids, predicted) -> tuple[np.float64, np.ndarray]:
    """Log-probability of the predicted ids of one sequence, and its gradient for `tokens` [P, D].

    Filler follows, which a causal model cannot see, so that all sequences run in one program.
    """
    longest = 40
    filler = longest - len(ids)
    assert filler > 0
    ids = np.append(ids, np.arange(100, 100 + filler, dtype=np.int32))
    predicted = np.append(predicted, np.zeros(filler, bool))
    score, gradient = _score(base.model, tokens, ids, predicted)
    return np.float64(score), np.asarray(gradient, np.float64)


def loss_alone(base: FrozenBase, tokens, examples: list[Example], weights=None) -> tuple[float, np.ndarray]:
    """Mean loss and its gradient, from every sequence alone: over the vocabulary, or for examples with choices over
    these. `weights` has one number per class."""
    total, gradient, weight = 0.0, np.zeros(tokens.shape), 0.0
    for example in examples:
        own = 1.0 if weights is None else weights[example.label]
        if not example.choices:
            score, slope = sequence_score(base, tokens, example.ids, example.predicted)
            total, gradient = total - own * score, gradient - own * slope
            weight += own * example.predicted.sum()
            continue
        scores, slopes = [], []
        for choice in example.choices:
            ids = np.concatenate([example.ids, choice])
            score, slope = sequence_score(base, tokens, ids, np.arange(len(ids)) >= len(example.ids))
            scores.append(score)
            slopes.append(slope)
        probabilities = np.exp(scores - np.logaddexp.reduce(scores))
        total -= own * np.log(probabilities[example.label])
        difference = probabilities - np.eye(len(scores))[example.label]
        gradient = gradient + own * np.tensordot(difference, np.stack(slopes), axes=1)
        weight += own
    return total / weight, gradient / weight


def same_gradient(ours, theirs, tolerance: float = 1e-5) -> float:
    """Asserts that two gradients agree within `tolerance` of their largest entry; returns the largest difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = np.abs(theirs).max()
    assert scale > 1e-4, "a gradient of nothing agrees with anything"
    worst = float(np.abs(ours - theirs).max() / scale)
    assert worst < tolerance, f"gradients differ by {worst:.1e} of the largest entry"
    return worst
