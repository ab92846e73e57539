"""Mixture-of-experts MLP: the router, the experts, and the two ways in which tokens reach them.

Every token is multiplied with all of its experts; there is no capacity above which tokens are dropped. The base is
frozen: gradients are with respect to the input only, through the experts and the weights of the router.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.layers import Linear, dense, linear
from spt_jax.models.quantized import KernelArray
from spt_jax.runtime.sharding import ROWS, fitting

# "dense": every expert computes all tokens. "blocks" and "ragged": pairs of a token and an expert are sorted by expert,
# and each expert computes its pairs only, in a loop over blocks of pairs or by `jax.lax.ragged_dot`.
Dispatch = Literal["dense", "blocks", "ragged"]

# Pairs per block. On two CPU cores (D 256), 64 is as fast as 128 where experts have hundreds of pairs.
MAX_BLOCK = 64

AXIS = "tensor"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """Kernels and biases, stacked over experts, or those of one expert without the axis E.

    Attributes:
      gate: kernel [E, D, F].
      up: kernel [E, D, F].
      down: kernel [E, F, D].
      gate_bias: [E, F], or None.
      up_bias: [E, F], or None.
      down_bias: [E, D], or None.
    """

    gate: Float[Array, "*E D F"] | KernelArray
    up: Float[Array, "*E D F"] | KernelArray
    down: Float[Array, "*E F D"] | KernelArray
    gate_bias: Float[Array, "*E F"] | None = None
    up_bias: Float[Array, "*E F"] | None = None
    down_bias: Float[Array, "*E D"] | None = None

    @property
    def count(self) -> int:
        """The number of experts."""
        return jax.tree.leaves(self.gate)[0].shape[0]


def router_logits(
    x: Float[Array, "*B D"], kernel: Float[Array, "D E"] | KernelArray, bias: Float[Array, " E"] | None = None
) -> Float[Array, "*B E"]:
    """Returns the logits of the router in float32, at full precision, as rounding could change the chosen experts."""
    logits = jnp.dot(x.astype(jnp.float32), dense(kernel), precision=jax.lax.Precision.HIGHEST)
    return logits if bias is None else logits + bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,))


def route(
    config: ExpertsConfig, logits: Float[Array, "*B E"], correction: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """Chooses the experts of each token.

    Args:
      config: scoring, groups and number of experts.
      logits: float32 logits of the router.
      correction: added to the scores for the choice only, if `config.correction`.

    Returns:
      The float32 weights of the `top_k` chosen experts, and their indices.
    """
    if config.scoring == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits) if config.scoring == "sigmoid" else logits
    choice = jax.lax.stop_gradient(scores)
    if correction is not None:
        choice = choice + correction.astype(jnp.float32).reshape((1,) * (choice.ndim - 1) + (-1,))
    if config.groups > 1:
        choice = _in_top_groups(config, choice)
    _, ids = jax.lax.top_k(choice, config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.scoring == "softmax_of_chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    if config.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + config.renormalize_epsilon)
    return weights * config.scale, ids


def _in_top_groups(config: ExpertsConfig, choice: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Returns the scores of the experts in the best groups, and -inf for all others."""
    grouped = choice.reshape(*choice.shape[:-1], config.groups, -1)
    best, _ = jax.lax.top_k(grouped, 1 if config.group_score == "max" else 2)
    _, groups = jax.lax.top_k(best.sum(axis=-1), config.top_groups)
    kept = jax.nn.one_hot(groups, config.groups, dtype=bool).any(axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def expert_mlp(config: ExpertsConfig, weights: ExpertWeights, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the output of one expert."""
    gate = linear(x, weights.gate, weights.gate_bias)
    up = linear(x, weights.up, weights.up_bias)
    return linear(_gated(config, gate, up), weights.down, weights.down_bias)


def _gated(config: ExpertsConfig, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    if config.gate == "swiglu":
        return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, config.gate_limit)
    up = jnp.clip(up, -config.gate_limit, config.gate_limit)
    return gate * jax.nn.sigmoid(config.gate_slope * gate) * (up + 1)


def choose_dispatch(config: ExpertsConfig, dtype: jnp.dtype, platform: str) -> Dispatch:
    """Returns the fastest way to compute the experts.

    Sorting saves a factor of E / k in arithmetic. Up to 2 this does not pay for smaller products. float16 is always
    sorted, as an expert that was not chosen may overflow. `ragged_dot` is one instruction on TPUs only: XLA expands it
    elsewhere to a product of every expert with all E M rows, M the number of pairs. On two CPU cores (E 64, k 8, D 256,
    F 128, 2048 tokens) it took 6.9 s, the dense path 0.8 s and blocks 0.11 s.
    """
    if config.experts <= 2 * config.top_k and dtype != jnp.float16:
        return "dense"
    return "ragged" if platform == "tpu" else "blocks"


def mix(
    config: ExpertsConfig,
    dispatch: Dispatch,
    weights: ExpertWeights,
    x: Float[Array, "M D"],
    coefficients: Float[Array, "M k"],
    ids: Int[Array, "M k"],
) -> Float[Array, "M D"]:
    """Returns the weighted sum of the outputs of each token's experts, float32.

    No gradient flows to the weights of the experts.

    Args:
      config: the experts.
      dispatch: how they are computed; the result is the same.
      weights: the weights of all experts, or of some, numbered from 0.
      x: inputs of the tokens.
      coefficients: float32 factors of the outputs.
      ids: the experts of the tokens. Those below 0 or not below the number of experts in `weights` count as 0.
    """
    weights = jax.lax.stop_gradient(weights)
    if dispatch == "dense":
        table = jnp.einsum("mk,mke->me", coefficients, jax.nn.one_hot(ids, weights.count), precision="highest")
        outputs = jax.vmap(functools.partial(expert_mlp, config), in_axes=(0, None))(weights, x)
        return jnp.einsum("emd,me->md", outputs.astype(jnp.float32), table, precision="highest")
    inside = (ids >= 0) & (ids < weights.count)
    experts = jnp.where(inside, ids, weights.count).reshape(-1)  # pairs of other experts come last
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=weights.count + 1)[:-1]
    pairs = jnp.broadcast_to(x[:, None], (*ids.shape, x.shape[-1])).reshape(-1, x.shape[-1])
    rows = _permuted(pairs, order)
    if dispatch == "blocks":
        outputs: Array = _in_blocks(config, _block_size(experts.size, weights.count), weights, rows, sizes)
    else:
        outputs = _ragged(config, weights, rows, sizes, experts[order])
    outputs = _permuted(outputs, jnp.argsort(order)).reshape(*ids.shape, -1).astype(jnp.float32)
    return jnp.einsum("mkd,mk->md", outputs, jnp.where(inside, coefficients, 0), precision="highest")


def _permuted(x: Float[Array, "M D"], order: Int[Array, " M"]) -> Float[Array, "M D"]:
    """Returns x[order]. As indices are unique, the gradient needs no additions, whose order could vary on GPUs."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _block_size(pairs: int, experts: int) -> int:
    """Returns about the mean number of pairs of an expert, so that few rows are computed in vain."""
    mean = -(-pairs // experts)
    return min(MAX_BLOCK, 1 << (mean - 1).bit_length())


def _map_blocks(
    function: Callable[..., Array],
    block: int,
    weights: ExpertWeights,
    rows: tuple[Float[Array, "M D"], ...],
    sizes: Int[Array, " E"],
) -> Float[Array, "M D"]:
    """Applies `function(weights of an expert, *rows)` to the rows of each expert, which are contiguous.

    The last block of an expert reaches into the rows of the next, whose blocks overwrite what it wrote there.

    Returns:
      The results, of the shape and dtype of the first array; 0 for rows after the last expert's.
    """
    count = rows[0].shape[0]
    blocks = -(-sizes // block)
    last_blocks = jnp.cumsum(blocks)
    first_blocks, first_rows = last_blocks - blocks, jnp.cumsum(sizes) - sizes
    padded = [jnp.pad(a, ((0, block), (0, 0))) for a in rows]

    def step(i: Array, out: Array) -> Array:
        expert = jnp.searchsorted(last_blocks, i, side="right")
        start = first_rows[expert] + block * (i - first_blocks[expert])
        own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False), weights)
        parts = [jax.lax.dynamic_slice_in_dim(a, start, block) for a in padded]
        return jax.lax.dynamic_update_slice_in_dim(out, function(own, *parts), start, axis=0)

    out = jax.lax.fori_loop(0, last_blocks[-1], step, jnp.zeros_like(padded[0]))[:count]
    return jnp.where((jnp.arange(count) < sizes.sum())[:, None], out, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(
    config: ExpertsConfig, block: int, weights: ExpertWeights, rows: Float[Array, "M D"], sizes: Int[Array, " E"]
) -> Float[Array, "M D"]:
    """Returns the outputs of the experts for rows sorted by expert. The backward pass computes hidden layers again."""
    return _map_blocks(functools.partial(expert_mlp, config), block, weights, (rows,), sizes)


def _in_blocks_forward(
    config: ExpertsConfig, block: int, weights: ExpertWeights, rows: Array, sizes: Array
) -> tuple[Array, tuple[ExpertWeights, Array, Array]]:
    return _in_blocks(config, block, weights, rows, sizes), (weights, rows, sizes)


def _in_blocks_backward(
    config: ExpertsConfig, block: int, saved: tuple[ExpertWeights, Array, Array], cotangent: Array
) -> tuple[None, Array, None]:
    weights, rows, sizes = saved

    def backward(own: ExpertWeights, rows: Array, cotangent: Array) -> Array:
        return jax.vjp(functools.partial(expert_mlp, config, own), rows)[1](cotangent)[0]

    return None, _map_blocks(backward, block, weights, (rows, cotangent), sizes), None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _ragged(
    config: ExpertsConfig,
    weights: ExpertWeights,
    rows: Float[Array, "M D"],
    sizes: Int[Array, " E"],
    experts: Int[Array, " M"],
) -> Float[Array, "M D"]:
    """Computes `_in_blocks` by `ragged_dot`, given the expert of each row. Quantized kernels are made dense."""
    inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]

    def grouped(x: Array, kernel: Array | KernelArray, bias: Array | None) -> Array:
        kernel = kernel.dense() if isinstance(kernel, KernelArray) else kernel
        y = jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)
        return y if bias is None else y + jnp.take(bias, experts, axis=0, mode="clip").astype(x.dtype)

    rows = jnp.where(inside, rows, 0)
    hidden = _gated(config, grouped(rows, weights.gate, weights.gate_bias), grouped(rows, weights.up, weights.up_bias))
    return jnp.where(inside, grouped(hidden, weights.down, weights.down_bias), 0)


def mix_on_mesh(
    mesh: Mesh,
    config: ExpertsConfig,
    dispatch: Dispatch,
    weights: ExpertWeights,
    x: Float[Array, "B T D"],
    coefficients: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
) -> Float[Array, "B T D"]:
    """Computes `mix` with each device sorting its own tokens, and computing its own experts.

    The "tensor" axis splits E, or F where it does not divide E, and the parts are added up; if it divides neither, all
    its devices compute the same. Kernels that are split over other axes are gathered.
    """
    size = mesh.shape[AXIS]
    by_expert = config.experts % size == 0
    by_width = not by_expert and config.expert_width % size == 0
    specs: Any = P(AXIS) if by_expert else P()
    if by_width:
        weights = jax.tree.map(dense, weights, is_leaf=lambda a: isinstance(a, KernelArray))
        columns, biases = P(None, None, AXIS), P(None, AXIS)
        specs = ExpertWeights(columns, columns, P(None, AXIS), biases, biases, P())  # type: ignore[arg-type]
        absent = {name.name: None for name in dataclasses.fields(weights) if getattr(weights, name.name) is None}
        specs = dataclasses.replace(specs, **absent)

    def of_device(weights: ExpertWeights, x: Array, coefficients: Array, ids: Array) -> Array:
        part = jax.lax.axis_index(AXIS)
        if by_expert:
            ids = ids - part * weights.count
        if by_width and weights.down_bias is not None:  # added once
            weights = dataclasses.replace(weights, down_bias=jnp.where(part == 0, weights.down_bias, 0))
        y = _mix_rows(config, dispatch, weights, x, coefficients, ids)
        return jax.lax.psum(y, AXIS) if by_expert or by_width else y

    tokens = fitting(mesh, P(ROWS, "sequence"), x.shape).spec
    inputs = (specs, tokens, tokens, tokens)
    return jax.shard_map(of_device, mesh=mesh, in_specs=inputs, out_specs=tokens, check_vma=False)(
        weights, x, coefficients, ids
    )


def _mix_rows(
    config: ExpertsConfig, dispatch: Dispatch, weights: ExpertWeights, x: Array, coefficients: Array, ids: Array
) -> Float[Array, "B T D"]:
    """Computes `mix` for tokens [B, T]."""
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, coefficients, ids)]
    return mix(config, dispatch, weights, *flat).reshape(x.shape)


class Router(nn.Module):
    """A linear map [D, E] in float32."""

    config: ExpertsConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        experts = self.config.experts
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], experts))
        bias = self.param("bias", nn.initializers.zeros, (experts,)) if self.config.router_bias else None
        return router_logits(x, kernel, bias)


class Stacked(nn.Module):
    """The kernel [E, rows, columns] and the optional bias [E, columns] of one linear map of all experts."""

    shape: tuple[int, int, int]
    use_bias: bool

    @nn.compact
    def __call__(self) -> tuple[Array | KernelArray, Array | None]:
        experts, _, columns = self.shape
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, (experts, columns)) if self.use_bias else None


class Stacks(nn.Module):
    """The weights of all experts."""

    config: ExpertsConfig

    @nn.compact
    def __call__(self, width: int) -> ExpertWeights:
        config = self.config
        inwards = (config.experts, width, config.expert_width)
        outwards = (config.experts, config.expert_width, width)
        gate, gate_bias = Stacked(inwards, config.bias, name="gate")()
        up, up_bias = Stacked(inwards, config.bias, name="up")()
        down, down_bias = Stacked(outwards, config.bias, name="down")()
        return ExpertWeights(gate, up, down, gate_bias, up_bias, down_bias)


class SharedMlp(nn.Module):
    """The SwiGLU MLP of all tokens."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        hidden = jax.nn.silu(Linear(self.hidden, name="gate")(x)) * Linear(self.hidden, name="up")(x)
        return Linear(x.shape[-1], name="down")(hidden)


class Experts(nn.Module):
    """Mixture-of-experts MLP (Shazeer et al. 2017, arXiv 1701.06538) with the variants of `ExpertsConfig`.

    Its parameters: `router/kernel` [D, E], `router/bias` and `correction` [E], `experts/{gate,up}/kernel` [E, D, F],
    `experts/down/kernel` [E, F, D], `experts/*/bias`, `shared/{gate,up,down}/kernel` and `shared_gate/kernel` [D, 1].

    Attributes:
      config: its shape.
      mesh: the devices that rows and weights are split over; None for one device.
      dispatch: how tokens reach their experts; None for what `choose_dispatch` returns.
    """

    config: ExpertsConfig
    mesh: Mesh | None = None
    dispatch: Dispatch | None = None

    @nn.compact
    @jax.named_scope("experts")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config, mesh = self.config, self.mesh
        logits = Router(config, name="router")(x)
        bias = self.param("correction", nn.initializers.zeros, (config.experts,)) if config.correction else None
        coefficients, ids = route(config, logits, bias)
        weights = Stacks(config, name="experts")(x.shape[-1])
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        dispatch = self.dispatch or choose_dispatch(config, x.dtype, platform)
        if mesh is None or mesh.size == 1:
            y = _mix_rows(config, dispatch, weights, x, coefficients, ids)
        else:
            y = mix_on_mesh(mesh, config, dispatch, weights, x, coefficients, ids)
        if config.shared_width:
            shared = SharedMlp(config.shared_width, name="shared")(x)
            if config.shared_gate:
                shared = jax.nn.sigmoid(Linear(1, name="shared_gate")(x)) * shared
            y = y + shared.astype(jnp.float32)
        return y.astype(x.dtype)
