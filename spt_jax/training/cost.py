"""What a training step costs, by formula."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.data.batches import Batch, BatchPlan
from spt_jax.models.config import DecoderConfig
from spt_jax.models.decoder import Remat
from spt_jax.models.vocabulary import CHUNK_LOGITS, CHUNK_ROWS
from spt_jax.runtime.sharding import row_shards, sharded_shapes


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


def plan_shape(plan: BatchPlan, prefix: int = 0) -> StepShape:
    """Sizes of the largest batch of a plan."""
    *prompts, lead = plan.lead_ids.shape
    return StepShape(plan.row_buckets[-1], plan.length, plan.outputs, lead, prefix, *prompts)


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


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """An estimate of the bytes that a step holds on each device at its peak.

    It is from above, except for bfloat16 on CPU, where XLA computes in float32.

    weights: of the frozen base; where fsdp splits them, with two layers gathered.
    kept: what the forward pass over a microbatch keeps for the backward pass, of all layers.
    layer: what one layer holds while it runs backward.
    logits: of one chunk of outputs, and the hidden states of all of them, which meet each device's part of the
      vocabulary.
    prefix: the leading ids' part of the above, and keys and values of the prefix with their cotangents.
    """

    weights: int
    kept: int
    layer: int
    logits: int
    prefix: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def of_prompts(self, count: int) -> "StepMemory":
        """Of a step of so many prompts together, which share the weights."""
        own = {name: count * size for name, size in dataclasses.asdict(self).items() if name != "weights"}
        return dataclasses.replace(self, **own)

    def __str__(self) -> str:
        parts = sorted(dataclasses.asdict(self).items(), key=lambda part: -part[1])
        listed = ", ".join(f"{_PARTS[name]} {size / 2**20:,.0f}" for name, size in parts)
        return f"{self.total / 2**20:,.0f} MiB ({listed})"


_PARTS = {
    "weights": "weights",
    "kept": "activations kept for the backward pass",
    "layer": "one layer at work",
    "logits": "logits",
    "prefix": "leading tokens",
}


def step_memory(
    config: DecoderConfig,
    shape: StepShape,
    *,
    remat: Remat,
    itemsize: int,
    mesh: Mesh,
    microbatches: int = 1,
) -> StepMemory:
    """What a step holds.

    Args:
      config: the base's sizes.
      shape: of the whole batch.
      remat: what the backward pass computes again.
      itemsize: bytes of a number in the base's precision.
      mesh: where the base lies.
      microbatches: parts of a batch, one after the other.
    """
    tensor = mesh.shape["tensor"]
    leaves = sharded_shapes(mesh, parameter_shapes(config), jnp.float32)
    weights = itemsize * sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(leaves))
    if mesh.shape["fsdp"] > 1:
        weights += 2 * itemsize * (config.matmul_parameters // config.layers) // tensor
    matrix = leaves["embedding" if config.tied else "output"]
    vocabulary = matrix.sharding.shard_shape(matrix.shape)[0 if config.tied else 1]
    outputs = math.ceil(shape.rows / (mesh.shape["data"] * microbatches)) * shape.outputs
    chunk = min(outputs, max(CHUNK_ROWS, CHUNK_LOGITS // config.vocab_size))
    rows = math.ceil(shape.rows / (row_shards(mesh) * microbatches))
    length = math.ceil(shape.length / mesh.shape["sequence"])
    seen = shape.prefix + shape.lead

    def layer(tokens: int, keys: int) -> int:
        return _layer_bytes(config, tokens, keys, itemsize, tensor)

    def kept(tokens: int, keys: int) -> int:
        return config.layers * _kept_bytes(config, tokens, keys, remat, itemsize, tensor)

    leading = shape.prompts * shape.lead
    pairs = 2 * config.layers * seen * shape.prompts * config.kv_heads * config.head_size
    return StepMemory(
        weights=weights,
        kept=kept(rows * length, seen + length),
        layer=layer(rows * length, seen + length),
        logits=3 * 4 * chunk * vocabulary + 3 * itemsize * outputs * config.width,
        prefix=kept(leading, seen) + layer(leading, seen) + 3 * 4 * pairs // tensor,
    )


def choose_remat(estimate: Callable[[Remat], StepMemory], limit: int | None) -> Remat:
    """What computes least again among what fits a device of so many bytes, with some room for what no estimate sees.

    Args:
      estimate: the memory under each.
      limit: None where it is not known: "dots", which on CPU is also faster than "none".
    """
    if limit is None:
        return "dots"
    kinds: tuple[Remat, ...] = ("none", "dots")
    fitting: list[Remat] = [kind for kind in kinds if estimate(kind).total <= 0.85 * limit]
    return fitting[0] if fitting else "full"


def _linear_outputs(config: DecoderConfig, tensor: int) -> int:
    """Numbers per token that a layer's linear maps give."""
    heads = (config.heads + 2 * config.kv_heads) * config.head_size // tensor
    return 2 * config.width + heads + (2 if config.gated_mlp else 1) * config.mlp_width // tensor


def _layer_bytes(config: DecoderConfig, tokens: int, keys: int, itemsize: int, tensor: int, scores: int = 4) -> int:
    """What a layer computes: linear maps twice over, norms, and so many arrays of scores in float32."""
    scores = scores * 4 * tokens * keys * config.heads // tensor
    return tokens * (2 * itemsize * _linear_outputs(config, tensor) + 4 * 4 * config.width) + scores


def _kept_bytes(config: DecoderConfig, tokens: int, keys: int, remat: Remat, itemsize: int, tensor: int) -> int:
    """What a layer leaves for its backward pass: its input, and what rematerialisation does not compute again."""
    if remat == "full":
        return itemsize * tokens * config.width
    if remat == "dots":
        return itemsize * tokens * (config.width + _linear_outputs(config, tensor))
    return _layer_bytes(config, tokens, keys, itemsize, tensor, scores=2)
