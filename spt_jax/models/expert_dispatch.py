"""How tokens reach their experts: densely, or sorted by expert. All ways give the same.

Every token is multiplied with all of its experts; there is no capacity above which tokens are dropped. The base is
frozen: gradients are with respect to the tokens and the weights of the router, and not to the weights of experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.layers import linear
from spt_jax.models.quantized import KernelArray

# "dense": every expert computes all tokens. "blocks" and "ragged": pairs of a token and an expert are sorted by expert,
# and each expert computes its pairs only, in a loop over blocks of pairs or by `jax.lax.ragged_dot`.
Dispatch = Literal["dense", "blocks", "ragged"]

# Pairs per block. On two CPU cores (D 256), 64 is as fast as 128 where experts have hundreds of pairs.
MAX_BLOCK = 64


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


def expert_mlp(config: ExpertsConfig, weights: ExpertWeights, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the output of one expert."""
    gate = linear(x, weights.gate, weights.gate_bias)
    up = linear(x, weights.up, weights.up_bias)
    return linear(_gated(config, gate, up), weights.down, weights.down_bias)


def _gated(config: ExpertsConfig, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    if config.gate == "swiglu":
        return jax.nn.silu(gate) * up
    if config.gate == "geglu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    gate = jnp.minimum(gate, config.gate_limit)
    up = jnp.clip(up, -config.gate_limit, config.gate_limit)
    return gate * jax.nn.sigmoid(config.gate_slope * gate) * (up + 1)


def choose_dispatch(config: ExpertsConfig, dtype: jnp.dtype, platform: str) -> Dispatch:
    """Returns the fastest way to compute the experts, as measured on two CPU cores in float32.

    Sorting saves a factor of E / k in arithmetic, and reads only the kernels of chosen experts: with E 8, k 2, D 256,
    F 512 and 512 tokens, forward and backward took 0.10 s in blocks and 0.28 s densely, and with 1 token 1.2 ms and
    7.1 ms. With 4 experts the dense path was faster (0.10 s and 0.12 s), with 16 of which 8 are chosen it was not. As
    an expert that was not chosen may overflow float16, that is always sorted.

    `ragged_dot` is one instruction on TPUs only. Elsewhere XLA expands it to a product of all experts with all pairs:
    with E 64, k 8, D 256, F 128 and 2048 tokens it took 16 s, the dense path 2.3 s and blocks 0.5 s.
    """
    if config.experts <= min(4, 2 * config.top_k) and dtype != jnp.float16:
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
    return _sorted(config, dispatch, weights, x, coefficients, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sorted(
    config: ExpertsConfig,
    dispatch: Dispatch,
    weights: ExpertWeights,
    x: Float[Array, "M D"],
    coefficients: Float[Array, "M k"],
    ids: Int[Array, "M k"],
) -> Float[Array, "M D"]:
    """Computes `mix` for pairs sorted by expert. The backward pass computes the experts again, to save memory."""
    return _merging_batches(functools.partial(_sorted_outputs, config, dispatch))(weights, x, coefficients, ids)


def _sorted_forward(
    config: ExpertsConfig, dispatch: Dispatch, weights: ExpertWeights, x: Array, coefficients: Array, ids: Array
) -> tuple[Array, tuple[ExpertWeights, Array, Array, Array]]:
    return _sorted(config, dispatch, weights, x, coefficients, ids), (weights, x, coefficients, ids)


def _sorted_backward(
    config: ExpertsConfig, dispatch: Dispatch, saved: tuple[ExpertWeights, Array, Array, Array], cotangent: Array
) -> tuple[None, Array, Array, None]:
    gradients = _merging_batches(functools.partial(_sorted_gradients, config, dispatch))
    of_x, of_coefficients = gradients(*saved, cotangent)
    return None, of_x, of_coefficients, None


_sorted.defvjp(_sorted_forward, _sorted_backward)


def _merging_batches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `vmap` of `function(weights, *tokens)` merge the tokens of a batch, as if they were those of one call.

    Otherwise each member would sort and read kernels separately, and `ragged_dot` has no `vmap` over group sizes.
    """
    merging = jax.custom_batching.custom_vmap(function)

    @merging.def_vmap
    def rule(size: int, batched: Any, weights: ExpertWeights, *tokens: Array) -> tuple[Any, Any]:
        if any(jax.tree.leaves(batched[0])):
            member = functools.partial(_member, tuple(batched), (weights, *tokens))
            result = jax.lax.map(lambda i: function(*member(i)), jnp.arange(size))
        else:
            members = [
                (a if flag else jnp.broadcast_to(a, (size, *a.shape))).reshape(-1, a.shape[-1])
                for a, flag in zip(tokens, batched[1:], strict=True)
            ]
            result = jax.tree.map(lambda a: a.reshape(size, -1, a.shape[-1]), merging(weights, *members))
        return result, jax.tree.map(lambda _: True, result)

    return merging


def _member(batched: Any, batch: Any, index: Array) -> Any:
    """Returns one member of a batch, whose arrays have the axis of the batch where `batched` is True."""
    return jax.tree.map(lambda flag, a: a[index] if flag else a, batched, batch)


def _sorted_outputs(
    config: ExpertsConfig, dispatch: Dispatch, weights: ExpertWeights, x: Array, coefficients: Array, ids: Array
) -> Float[Array, "M D"]:
    """Returns the weighted sums of the outputs, float32."""
    pairs = Pairs.of(ids, weights.count)
    outputs = _for_experts(config, dispatch, _output, weights, pairs, (pairs.sort(_for_each(x, ids)),))
    coefficients = jnp.where(pairs.inside, coefficients, 0)
    return jnp.einsum("mkd,mk->md", pairs.unsort(outputs), coefficients, precision="highest")


def _sorted_gradients(
    config: ExpertsConfig,
    dispatch: Dispatch,
    weights: ExpertWeights,
    x: Array,
    coefficients: Array,
    ids: Array,
    cotangent: Array,
) -> tuple[Float[Array, "M D"], Float[Array, "M k"]]:
    """Returns the gradients with respect to x and the coefficients, given that of the output."""
    pairs = Pairs.of(ids, weights.count)
    rows = tuple(pairs.sort(a) for a in (_for_each(x, ids), _for_each(cotangent, ids), coefficients.reshape(-1, 1)))
    of_x, of_coefficients = _for_experts(config, dispatch, _output_gradients, weights, pairs, rows)
    of_coefficients = jnp.where(pairs.inside, pairs.unsort(of_coefficients)[:, :, 0], 0)
    return pairs.unsort(of_x).sum(axis=1).astype(x.dtype), of_coefficients


def _output(mlp: Callable[[Array], Array], x: Float[Array, "M D"]) -> Float[Array, "M D"]:
    return mlp(x)


def _output_gradients(
    mlp: Callable[[Array], Array], x: Float[Array, "M D"], cotangent: Float[Array, "M D"], factor: Float[Array, "M 1"]
) -> tuple[Float[Array, "M D"], Float[Array, "M 1"]]:
    """Returns the gradients of factor * mlp(x) with respect to x and the factor."""
    output, pull = jax.vjp(mlp, x)
    of_factor = jnp.sum(output.astype(jnp.float32) * cotangent, axis=-1, keepdims=True)
    return pull((cotangent * factor).astype(x.dtype))[0], of_factor


def _for_each(x: Float[Array, "M D"], ids: Int[Array, "M k"]) -> Float[Array, "Mk D"]:
    """Repeats the rows of tokens for each of their experts."""
    return jnp.repeat(x, ids.shape[1], axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a token and an expert, sorted by expert.

    Attributes:
      inside: [M, k], whether the expert is one of those that are computed. Pairs of other experts come last.
      order: [M k], the pairs by expert.
      experts: [M k], their experts.
      sizes: [E], the number of pairs of each expert.
    """

    inside: Array
    order: Array
    experts: Array
    sizes: Array

    @classmethod
    def of(cls, ids: Int[Array, "M k"], count: int) -> "Pairs":
        """Sorts the pairs of `ids` for `count` experts."""
        inside = (ids >= 0) & (ids < count)
        experts = jnp.where(inside, ids, count).reshape(-1)
        order = jnp.argsort(experts, stable=True)
        return cls(inside, order, experts[order], jnp.bincount(experts, length=count + 1)[:-1])

    def sort(self, x: Float[Array, "Mk D"]) -> Float[Array, "Mk D"]:
        return jnp.take(x, self.order, axis=0, unique_indices=True, mode="clip")

    def unsort(self, x: Float[Array, "Mk D"]) -> Float[Array, "M k D"]:
        """Returns sorted rows in the order of the tokens, float32."""
        places = jnp.arange(len(self.order), dtype=self.order.dtype)
        inverse = jnp.zeros_like(self.order).at[self.order].set(places, unique_indices=True)  # cheaper than a sort
        rows = jnp.take(x, inverse, axis=0, unique_indices=True, mode="clip")
        return rows.reshape(*self.inside.shape, -1).astype(jnp.float32)


def _for_experts(
    config: ExpertsConfig,
    dispatch: Dispatch,
    function: Callable[..., Any],
    weights: ExpertWeights,
    pairs: Pairs,
    rows: tuple[Float[Array, "Mk _"], ...],
) -> Any:
    """Returns `function(MLP of the experts, *rows)` for sorted rows; 0 for pairs of experts that are not inside."""
    inside = (jnp.arange(len(pairs.order)) < pairs.sizes.sum())[:, None]
    if dispatch == "ragged":
        rows = tuple(jnp.where(inside, a, 0) for a in rows)
        result = function(functools.partial(_ragged_mlp, config, weights, pairs), *rows)
    else:
        result = _map_blocks(config, function, weights, pairs.sizes, rows)
    return jax.tree.map(lambda a: jnp.where(inside, a, 0), result)


def _ragged_mlp(
    config: ExpertsConfig, weights: ExpertWeights, pairs: Pairs, x: Float[Array, "Mk D"]
) -> Float[Array, "Mk D"]:
    """Returns the outputs of the experts for all sorted rows. Quantized kernels are made dense."""

    def grouped(x: Array, kernel: Array | KernelArray, bias: Array | None) -> Array:
        kernel = kernel.dense() if isinstance(kernel, KernelArray) else kernel
        y = jax.lax.ragged_dot(x, kernel.astype(x.dtype), pairs.sizes)
        return y if bias is None else y + jnp.take(bias, pairs.experts, axis=0, mode="clip").astype(x.dtype)

    gate, up = grouped(x, weights.gate, weights.gate_bias), grouped(x, weights.up, weights.up_bias)
    return grouped(_gated(config, gate, up), weights.down, weights.down_bias)


def _block_size(pairs: int, experts: int) -> int:
    """Returns about the mean number of pairs of an expert, so that few rows are computed in vain."""
    mean = -(-pairs // experts)
    return min(MAX_BLOCK, 1 << (mean - 1).bit_length())


def _map_blocks(
    config: ExpertsConfig,
    function: Callable[..., Any],
    weights: ExpertWeights,
    sizes: Int[Array, " E"],
    rows: tuple[Float[Array, "Mk _"], ...],
) -> Any:
    """Applies `function(MLP of an expert, *rows)` to blocks of sorted rows, each of one expert.

    The last block of an expert reaches into the rows of the next, whose blocks overwrite what it wrote there.
    """
    count = rows[0].shape[0]
    block = _block_size(count, weights.count)
    blocks = -(-sizes // block)
    last_blocks = jnp.cumsum(blocks)
    first_blocks, first_rows = last_blocks - blocks, jnp.cumsum(sizes) - sizes
    padded = [jnp.pad(a, ((0, block), (0, 0))) for a in rows]

    def of_block(i: Array) -> tuple[Array, Any]:
        expert = jnp.searchsorted(last_blocks, i, side="right")
        start = first_rows[expert] + block * (i - first_blocks[expert])
        own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False), weights)
        parts = [jax.lax.dynamic_slice_in_dim(a, start, block) for a in padded]
        return start, function(functools.partial(expert_mlp, config, own), *parts)

    def step(i: Array, results: Any) -> Any:
        start, own = of_block(i)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(update, results, own)

    _, shapes = jax.eval_shape(of_block, jax.ShapeDtypeStruct((), jnp.int32))
    empty = jax.tree.map(lambda a: jnp.zeros((count + block, *a.shape[1:]), a.dtype), shapes)
    return jax.tree.map(lambda a: a[:count], jax.lax.fori_loop(0, last_blocks[-1], step, empty))
