"""What a training step costs, by formula."""

import dataclasses

from spt_jax.data.batches import Batch
from spt_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Static sizes of a step: B rows of T tokens with Q outputs each, behind S prompts.

    lead: leading ids P of every prompt, which go through the layers once.
    prefix: positions of a prompt's own keys and values, which do not.
    """

    rows: int
    length: int
    outputs: int
    lead: int = 0
    prefix: int = 0
    prompts: int = 1


def step_shape(batch: Batch, prefix: int = 0) -> StepShape:
    """Sizes of a batch's arrays, for a method with so many positions of its own keys and values."""
    rows, length = batch.rows.ids.shape
    *prompts, lead = batch.lead_ids.shape
    return StepShape(rows, length, batch.rows.outputs.shape[1], lead, prefix, *prompts)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of the matrix products of a step, on all devices together.

    The base is frozen: a linear map costs 2 per weight and token forward and 2 backward, where full training has 4.

    lead: linear maps of the leading ids; of the last layer only keys and values.
    rows: linear maps of the rows.
    attention: scores and mixtures, of all keys alike: masks save nothing.
    output: the output matrix, at the output positions alone.
    """

    lead: int
    rows: int
    attention: int
    output: int

    @property
    def total(self) -> int:
        return self.lead + self.rows + self.attention + self.output


def step_flops(config: DecoderConfig, shape: StepShape) -> StepFlops:
    """What a step has to compute, without what rematerialisation computes again.

    Padding counts; a method's own network, its head, and gated prefixes do not.
    """
    per_layer = config.matmul_parameters // config.layers
    keys_values = 2 * config.width * config.kv_heads * config.head_size
    leading = shape.prompts * shape.lead
    tokens = shape.rows * shape.length
    # A query and a key: 2 H each for score and mixture of every head forward, twice that backward.
    pair = 12 * config.heads * config.head_size
    seen = shape.prefix + shape.lead
    return StepFlops(
        lead=4 * leading * ((config.layers - 1) * per_layer + keys_values),
        rows=4 * tokens * config.matmul_parameters,
        attention=pair * ((config.layers - 1) * leading * seen + config.layers * tokens * (seen + shape.length)),
        output=4 * shape.rows * shape.outputs * config.width * config.vocab_size,
    )
