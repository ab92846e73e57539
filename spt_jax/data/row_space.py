"""The space that an example takes up in a row."""

import dataclasses

from spt_jax.data.examples import Example
from spt_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """The space that an example takes up in a row, and the prompt that the whole row must have.

    `decoder` is the number of those tokens that the decoder of an encoder-decoder reads.
    """

    tokens: int
    outputs: int
    targets: int
    prompt: int
    decoder: int = 0


def slots(example: Example, lead: int) -> Slots:
    """Returns the space that an example needs if its first `lead` ids are shared.

    The last id of a sequence is only a target, never an input.

    Raises:
      DataError: the example has nothing to predict, or no id after the shared ones to predict it from.
    """
    if not example.choices and example.reads is None and not example.predicted.any():
        raise DataError(f"record {example.index + 1}: nothing to predict: the target has no tokens")
    if example.first_target <= lead:
        raise DataError(
            f"record {example.index + 1}: no token precedes the first token to predict; begin the prompt with text"
        )
    if example.choices:
        extra = sum(len(choice) - 1 for choice in example.choices)
        tokens, outputs, targets = len(example.ids) + extra, 1 + extra, sum(map(len, example.choices))
    elif example.reads is not None:
        tokens, outputs, targets = len(example.ids), len(example.reads), len(example.reads)
    else:
        outputs = targets = int(example.predicted.sum())
        tokens = len(example.ids) - int(example.predicted[-1])
    decoder = 0 if example.starts is None else tokens - example.starts
    return Slots(tokens - lead, outputs, targets, example.prompt, decoder)
