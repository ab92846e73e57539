"""Estimates the operations and the memory of a training step by formula."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spt_jax.bases.checkpoint import is_table, parameter_shapes, quantizable, table_shape, table_sharding
from spt_jax.data.batches import Batch, BatchPlan
from spt_jax.models import delta_net_config, mamba_config
from spt_jax.models.config import DecoderConfig, layer_configs
from spt_jax.models.decoder import decoder_layout
from spt_jax.models.disentangled import occurring
from spt_jax.models.memory import state_spec
from spt_jax.models.model import Params
from spt_jax.models.model_config import ModelConfig
from spt_jax.models.quantized import KERNEL_ARRAYS, KernelArray, TableArray
from spt_jax.models.quantized.kernel_array import encoded_shapes
from spt_jax.models.quantized.table import table_shapes
from spt_jax.models.stacks import Remat
from spt_jax.models.vocabulary import CHUNK_LOGITS, CHUNK_ROWS
from spt_jax.runtime.sharding import row_shards, sharded_shapes

# Dense copies, in float32, of the largest quantized kernel of a layer while it is multiplied.
DENSE_COPIES = 2


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Static sizes of a step.

    Attributes:
      rows: the number of rows B.
      length: the number of tokens T of a row.
      outputs: the number of outputs Q of a row.
      lead: the number of leading ids P of each prompt, which go through the layers once.
      prefix: the number of positions of a prompt's keys and values, which do not go through the layers.
      prompts: the number of prompts S.
      decoder: the number U of a row's tokens that the decoder of an encoder-decoder reads; 0 for other bases.
      edit_rank: the rank r of the edits of hidden states after each layer (`HiddenEdits`); 0 without edits.
    """

    rows: int
    length: int
    outputs: int
    lead: int = 0
    prefix: int = 0
    prompts: int = 1
    decoder: int = 0
    edit_rank: int = 0


def step_shape(batch: Batch, prefix: int = 0) -> StepShape:
    """Returns the sizes of a batch, for a method whose keys and values have `prefix` positions."""
    rows, length = batch.rows.ids.shape
    *prompts, lead = batch.lead_ids.shape
    return StepShape(rows, length, batch.rows.outputs.shape[1], lead, prefix, *prompts)


def plan_shape(plan: BatchPlan, prefix: int = 0, edit_rank: int = 0) -> StepShape:
    """Returns the sizes of the largest batch of a plan, for a method with such a prefix or such edits."""
    *prompts, lead = plan.lead_ids.shape
    shape = StepShape(plan.row_buckets[-1], plan.length, plan.outputs, lead, prefix, *prompts)
    return dataclasses.replace(shape, decoder=plan.decoder, edit_rank=edit_rank)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of the matrix products of a step, summed over all devices.

    The base is frozen, so a linear map costs 2 operations per weight and token in the forward pass and 2 in the
    backward pass, where full training needs 4.

    Attributes:
      lead: linear maps of the leading ids, up to the last layer with keys and values of its own, and there only those.
      rows: linear maps of the rows.
      attention: attention scores and weighted sums over all keys, since masks save nothing.
      output: the output matrix, only at the output positions.
    """

    lead: int
    rows: int
    attention: int
    output: int

    @property
    def total(self) -> int:
        return self.lead + self.rows + self.attention + self.output


def step_flops(config: DecoderConfig, shape: StepShape) -> StepFlops:
    """Returns the operations that a step needs, without those repeated by rematerialization.

    Padding is included. The method's network, task heads, gated prefixes, linear memories and edits are not.
    """
    layers = layer_configs(config)
    *others, last = [one for one in layers if one.kv_source is None]
    keys_values = 0 if last.recurrent is None else last.recurrent.matmul_parameters(last.width)
    if last.attends:
        keys_values += last.width * (last.latent.key_size if last.latent else 2 * last.kv_heads * last.head_size)
    leading = shape.prompts * shape.lead
    tokens = shape.rows * shape.length
    pairs = [_pair_flops(one) for one in layers]
    distances = sum(_distance_flops(one, shape.length, tokens) for one in layers)
    by_layer = 0 if config.per_layer is None else config.width * config.layers * config.per_layer.width
    seen = shape.prefix + shape.lead
    return StepFlops(
        lead=4 * leading * (sum(one.matmul_parameters_of_layer for one in others) + keys_values + by_layer),
        rows=4 * tokens * config.matmul_parameters,
        attention=sum(pairs[: len(others)]) * leading * seen + sum(pairs) * tokens * (seen + shape.length) + distances,
        output=4 * shape.rows * shape.outputs * config.input_width * config.vocab_size,
    )


def functional_flops(parameters: int, shape: StepShape) -> int:
    """Estimates the operations of a step of a model whose layers are not known.

    Every parameter counts as an entry of a linear map, with 2 operations per token in the forward pass and 2 in the
    backward pass, and every row has the leading ids.

    Args:
      parameters: the number of parameters.
      shape: the sizes of the batch.
    """
    return 4 * parameters * shape.rows * (shape.lead + shape.length)


def _pair_flops(config: DecoderConfig) -> int:
    """Returns the operations of one layer per query and key.

    Per head, 2 H each for the score and the weighted sum in the forward pass, and twice that backward. A Gated DeltaNet
    layer has two scores and two sums; the scores of a Mamba-2 layer are those of its groups. In rows longer than a
    chunk, both need less.
    """
    operations = 0
    if config.delta_net is not None:
        operations += 12 * config.delta_net.value_heads * (config.delta_net.key_size + config.delta_net.value_size)
    if config.mamba is not None:
        operations += 6 * (config.mamba.key_width + config.mamba.value_width)
    if config.attends and config.latent is not None:
        operations += 6 * config.heads * (config.latent.key_size + config.latent.rank)
    elif config.attends:
        operations += 12 * config.heads * config.head_size
    return operations


def _distance_flops(config: DecoderConfig, length: int, tokens: int) -> int:
    """Returns the operations of one layer for terms of distances, with rows of `length` and `tokens` in all.

    Each token is multiplied with the embeddings of distances, of which maps are computed in the forward pass only.
    """
    own = config.disentangled
    if own is None:
        return 0
    size = config.heads * config.head_size
    return own.terms * len(occurring(own, length)) * (4 * tokens * size + 2 * config.width * size)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """An estimate of the peak memory of a step in bytes per device.

    It is an upper bound, except for bfloat16 on CPU, where XLA computes in float32.

    Attributes:
      weights: the weights of the frozen base; with fsdp, including two gathered layers; if quantized, including dense
        copies of one kernel.
      kept: activations of all layers that the forward pass of a microbatch saves for the backward pass.
      layer: the memory of one layer during its backward pass.
      logits: the logits of one chunk of outputs over a device's part of the vocabulary, and the hidden states of all
        outputs.
      prefix: the share of the leading ids in the above, and the keys, values and states of the prefix and the edits
        of hidden states, with their cotangents.
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
        """Returns the estimate for a step of `count` prompts together, which share the weights."""
        sizes = {name: count * size for name, size in dataclasses.asdict(self).items() if name != "weights"}
        return dataclasses.replace(self, **sizes)

    def __str__(self) -> str:
        parts = sorted(dataclasses.asdict(self).items(), key=lambda part: -part[1])
        listed = ", ".join(f"{_PARTS[name]} {size / 2**20:,.0f}" for name, size in parts)
        return f"{self.total / 2**20:,.0f} MiB ({listed})"


_PARTS = {
    "weights": "weights",
    "kept": "activations kept for the backward pass",
    "layer": "one layer's backward pass",
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
    quantize: str | None = None,
    params: Params | None = None,
) -> StepMemory:
    """Estimates the peak memory of a step.

    Args:
      config: the base's config.
      shape: the sizes of the whole batch.
      remat: what the backward pass recomputes.
      itemsize: bytes per number in the base's dtype.
      mesh: the mesh of the base.
      microbatches: the number of parts that a batch is split into.
      quantize: the representation of the kernels, by its name in `KERNEL_ARRAYS`; None for floats.
      params: the parameters of the base, if it is loaded: what they take is counted, whatever `quantize` says.
    """
    tensor, layers = mesh.shape["tensor"], layer_configs(config)
    largest_layer = max(one.matmul_parameters_of_layer for one in layers)
    weights, logits = weight_and_logit_bytes(
        config, shape, largest_layer, itemsize, mesh, microbatches, quantize, params
    )
    rows = math.ceil(shape.rows / (row_shards(mesh) * microbatches))
    length = math.ceil(shape.length / mesh.shape["sequence"])
    seen, rank = shape.prefix + shape.lead, shape.edit_rank

    def layer(tokens: int, keys: int) -> int:
        return _layer_bytes_of_edits(config.width, rank, tokens) + max(
            _layer_bytes(one, tokens, keys, itemsize, tensor) + _distance_bytes(one, tokens, keys, tensor)
            for one in layers
        )

    def kept(tokens: int, keys: int, shared: int) -> int:
        of_edits = _kept_bytes_of_edits(config.width, rank, tokens, remat, itemsize)
        return sum(_kept_bytes(one, tokens, keys, shared, remat, itemsize, tensor) + of_edits for one in layers)

    leading = shape.prompts * shape.lead
    layout = decoder_layout(config)
    groups = layout.attention_groups.values()
    per_position = sum(len(group.layers) * group.kv_heads * (group.key_size + group.value_size) for group in groups)
    pairs = seen * shape.prompts * per_position
    states = shape.prompts * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state_spec(layout.state_groups)))
    edits = shape.prompts * len(layers) * rank * (2 * config.width + 1)
    return StepMemory(
        weights=weights,
        kept=kept(rows * length, seen + length, seen),
        layer=layer(rows * length, seen + length),
        logits=3 * logits + 3 * itemsize * outputs_of(shape, mesh, microbatches) * config.input_width,
        prefix=kept(leading, seen, shape.prefix) + layer(leading, seen) + 3 * 4 * (pairs // tensor + states + edits),
    )


def outputs_of(shape: StepShape, mesh: Mesh, microbatches: int) -> int:
    """Returns the number of outputs of a microbatch on each device.

    Args:
      shape: the sizes of the whole batch.
      mesh: the mesh of the base.
      microbatches: the number of parts that a batch is split into.
    """
    return math.ceil(shape.rows / (mesh.shape["data"] * microbatches)) * shape.outputs


def weight_and_logit_bytes(
    config: ModelConfig,
    shape: StepShape,
    largest_layer: int,
    itemsize: int,
    mesh: Mesh,
    microbatches: int,
    quantize: str | None,
    params: Params | None,
) -> tuple[int, int]:
    """Returns the bytes of `StepMemory.weights`, and of the float32 logits of one chunk, on each device.

    Args:
      config: the base's config.
      shape: the sizes of the whole batch.
      largest_layer: the most parameters of a layer that tokens are multiplied with.
      itemsize: bytes per number in the base's dtype.
      mesh: the mesh of the base.
      microbatches: the number of parts that a batch is split into.
      quantize: the representation of the kernels; None for floats.
      params: the parameters of the base, if it is loaded.
    """
    leaves = sharded_shapes(mesh, parameter_shapes(config), jnp.float32)
    weights = _weight_bytes(leaves, itemsize, quantize) if params is None else _loaded_bytes(leaves, params)
    if mesh.shape["fsdp"] > 1:
        weights += 2 * itemsize * largest_layer // mesh.shape["tensor"]
    matrix, axis = (leaves["output"], 1) if "output" in leaves else (leaves["embedding"], 0)
    vocabulary = matrix.sharding.shard_shape(matrix.shape)[axis]
    outputs = outputs_of(shape, mesh, microbatches)
    chunk = min(outputs, max(CHUNK_ROWS, CHUNK_LOGITS // config.vocab_size))
    return weights, 4 * chunk * vocabulary


def _weight_bytes(leaves: Any, itemsize: int, quantize: str | None) -> int:
    """Returns the bytes on each device of leaves with shardings and, if quantized, of the largest kernel made dense."""
    total, largest = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        keys = tuple(key.key for key in path)
        if quantize is None or not (is_table(keys) or quantizable(keys)):
            total += itemsize * shard
            continue
        if is_table(keys):
            total += _bytes(table_shapes(table_shape(keys, leaf.shape), table_sharding(keys, leaf.sharding)))
            continue
        total += _bytes(encoded_shapes(KERNEL_ARRAYS[quantize], leaf.shape, leaf.sharding))
        largest = max(largest, _per_layer(leaf))
    return total + DENSE_COPIES * 4 * largest


def _loaded_bytes(leaves: Any, params: Params) -> int:
    """Returns the bytes on each device of loaded leaves and, if quantized, of the largest kernel made dense."""
    arrays = jax.tree.leaves(params)
    total = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
    packed = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, KernelArray | TableArray))
    dense = jax.tree.leaves(leaves)
    sizes = [_per_layer(leaf) for leaf, own in zip(dense, packed, strict=True) if isinstance(own, KernelArray)]
    return total + DENSE_COPIES * 4 * max(sizes, default=0)


def _per_layer(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns how many numbers of a layer's kernel are on each device."""
    assert leaf.sharding is not None
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape[1:] if leaf.ndim > 2 else shape)


def _bytes(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Returns the bytes of arrays on each device."""
    return sum(math.prod(own.sharding.shard_shape(own.shape)) * own.dtype.itemsize for own in arrays.values())


def choose_remat(estimate: Callable[[Remat], StepMemory], limit: int | None) -> Remat:
    """Returns the kind of rematerialization that recomputes least among those that fit in the memory of a device.

    Of the memory, 15 % is left free for what the estimate does not include.

    Args:
      estimate: returns the memory that a kind needs.
      limit: the memory of a device in bytes. If None, it is unknown and the result is "dots", which on CPU is also
        faster than "none".
    """
    if limit is None:
        return "dots"
    kinds: tuple[Remat, ...] = ("none", "dots")
    fitting: list[Remat] = [kind for kind in kinds if estimate(kind).total <= 0.85 * limit]
    return fitting[0] if fitting else "full"


def _linear_outputs(config: DecoderConfig, tensor: int) -> int:
    """Returns how many numbers per token a layer's linear maps output."""
    own = 2 * config.kv_heads if config.kv_source is None else 0
    heads = (config.heads + own) * config.head_size if config.attends else 0
    if config.attends and config.latent is not None:
        heads = config.heads * (2 * config.latent.key_size + config.latent.rank) + config.latent.key_size
    if config.recurrent is not None:
        heads += 2 * config.recurrent.key_width + 2 * config.recurrent.value_width
    mlp = (2 if config.gated_mlp else 1) * config.mlp_width
    if config.experts is not None:
        mlp = (mlp if config.experts_beside_mlp else 0) + 2 * (
            config.experts.top_k * config.experts.expert_width + config.experts.shared_width
        )
    by_layer = 0 if config.per_layer is None else config.width + 2 * config.per_layer.width
    return 2 * config.width + by_layer + (heads + mlp) // tensor


def _layer_bytes(config: DecoderConfig, tokens: int, keys: int, itemsize: int, tensor: int, scores: int = 4) -> int:
    """Returns the bytes of a layer's linear outputs (twice), norms, and `scores` float32 arrays of attention scores."""
    per_token = keys * config.heads if config.attends else 0
    if config.delta_net is not None:
        per_token += 2 * min(keys, delta_net_config.CHUNK) * config.delta_net.value_heads
    if config.mamba is not None:
        per_token += 2 * min(keys, mamba_config.CHUNK) * config.mamba.heads
    scores = scores * 4 * tokens * per_token // tensor
    return tokens * (2 * itemsize * _linear_outputs(config, tensor) + 4 * 4 * config.width) + scores


def _distance_bytes(config: DecoderConfig, tokens: int, keys: int, tensor: int) -> int:
    """Returns the bytes of the products of tokens and embeddings of distances, and of those that scores take."""
    own = config.disentangled
    return 0 if own is None else 4 * own.terms * (len(occurring(own, keys)) + keys) * tokens * config.heads // tensor


def _kept_bytes(
    config: DecoderConfig, tokens: int, keys: int, shared: int, remat: Remat, itemsize: int, tensor: int
) -> int:
    """Returns the bytes that a layer saves for its backward pass: its input, and what is not rematerialized.

    Without rematerialization these include queries and attention weights in the order in which one product of all rows
    takes them, if there are `shared` keys.
    """
    if remat == "full":
        return itemsize * tokens * config.width
    if remat == "dots":
        return itemsize * tokens * (config.width + _linear_outputs(config, tensor))
    size = config.head_size if config.latent is None else config.latent.key_size
    in_order = tokens * config.heads * (size + shared) // tensor if shared and config.attends else 0
    return _layer_bytes(config, tokens, keys, itemsize, tensor, scores=2) + itemsize * in_order


def _kept_bytes_of_edits(width: int, rank: int, tokens: int, remat: Remat, itemsize: int) -> int:
    """Returns the bytes that the edit of a layer's output saves for the backward pass; see `edited`.

    Of h + (h A + rms(h) b) C, those are h, which for "dots" is computed from the output of the MLP, twice h in float32,
    the derivative of the square in rms(h), and the factor of C in float32 and in the precision of h.
    """
    if not rank or remat == "full":
        return 0
    derivative = 4 * width if remat == "none" else 0
    return tokens * (itemsize * width + derivative + (4 + itemsize) * rank)


def _layer_bytes_of_edits(width: int, rank: int, tokens: int) -> int:
    """Returns the bytes of the edit of a layer's output during its backward pass; see `edited`.

    In float32, those are h, the derivative of its square, the product with C, the sum, the cotangents of h and of the
    sum, and the factor of C with its cotangent.
    """
    return 4 * tokens * (6 * width + 2 * rank) if rank else 0
