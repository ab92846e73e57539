"""Mixture-of-experts MLP: the router, the experts, and the shared MLP.

Gradients are with respect to the input only, through the experts and the weights that the router gives them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from spt_jax.models.expert_dispatch import Dispatch, ExpertWeights, choose_dispatch, mix
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.layers import Linear, dense, kernel_param
from spt_jax.models.quantized import KernelArray
from spt_jax.runtime.sharding import ROWS, fitting

AXIS = "tensor"


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
    """A linear map [D, E] in float32, after a norm if the config has one."""

    config: ExpertsConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        experts, epsilon = self.config.experts, self.config.router_norm_epsilon
        if epsilon is not None:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
            x = x * scale.reshape((1,) * (x.ndim - 1) + (-1,)) * x.shape[-1] ** -0.5
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
        kernel = kernel_param(self, self.shape)
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
    `experts/down/kernel` [E, F, D], `experts/*/bias`, `shared/{gate,up,down}/kernel` and `shared_gate/kernel` [D, 1],
    `router/scale` [D] and `scale` [E].

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
    def __call__(self, x: Float[Array, "B T D"], routed: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
        """Returns the outputs for x; the router reads `routed`, by default x."""
        config, mesh = self.config, self.mesh
        logits = Router(config, name="router")(x if routed is None else routed)
        bias = self.param("correction", nn.initializers.zeros, (config.experts,)) if config.correction else None
        coefficients, ids = route(config, logits, bias)
        if config.expert_scale:
            scale = self.param("scale", nn.initializers.ones, (config.experts,))
            coefficients = coefficients * jnp.take(scale.astype(jnp.float32), ids)
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
