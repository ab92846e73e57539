"""The training step: the frozen base is captured, the prompt's few parameters are differentiated.

    params --materialize--> VirtualPrompt --encode_prefix--> Prefix --rows--> loss
               (vjp once)                    (vjp once)       (scan over microbatches)

The leading run that all examples share goes through the model once per step, whatever the number of rows and
microbatches; the cotangents of its keys and values, and of virtual rows further on, are summed and sent back once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.checkpoint import Params
from spt_jax.data.batches import Batch, Rows
from spt_jax.inference.forward import encode_prefix, lead_logits, target_scores
from spt_jax.models.attention import Prefix
from spt_jax.models.decoder import Decoder
from spt_jax.prompts import Method, PromptParams, VirtualPrompt
from spt_jax.runtime.sharding import replicated
from spt_jax.training.losses import LOSSES, context_loss

Metrics = dict[str, Float[Array, ""]]

# What a float16 base's cotangents are multiplied with. They are those of a sum over targets, of the order of an
# embedding's entries, which the smallest normal number, 6e-5, would cut off; the largest is 65504.
LOSS_SCALE = 2.0**8
SCALE_STEP = 2.0**8
LEAST_SCALE = 2.0**-16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: optimizer steps done, the prompt's parameters (float32) and the optimizer's state."""

    step: Int[Array, ""]
    params: PromptParams
    optimizer_state: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The static part of a loss: over `vocabulary` or `verbalizers`, choices per example, smoothing, microbatches."""

    over: str = "vocabulary"
    choices: int = 1
    label_smoothing: float = 0.0
    microbatches: int = 1


def init_state(
    key: Key[Array, ""], base: FrozenBase, method: Method, optimizer: optax.GradientTransformation
) -> TrainState:
    """Fresh parameters and optimizer state, on every device of the base's mesh."""
    params = method.init_params(key, base)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    return jax.device_put(state, replicated(base.mesh))


def loss_and_gradient(
    module: Decoder, method: Method, objective: Objective, frozen: Params, params: PromptParams, batch: Batch
) -> tuple[Float[Array, ""], PromptParams, Float[Array, ""]]:
    """Mean loss of a batch, its gradient for the prompt's parameters alone, and the weight that the mean was over.

    Pure and unbound, for loops of your own: jit it with `frozen` as an argument.

    In a float16 base, small cotangents would become zero. There the loss is scaled by `LOSS_SCALE` (Micikevicius et al.
    2018, arXiv 1710.03740), and where the gradient overflows, it is computed again with smaller scales: no update is
    skipped, and a step depends on nothing but its state and batch.
    """

    def with_scale(scale: Any) -> tuple[Array, PromptParams, Array]:
        return _scaled_loss_and_gradient(module, method, objective, frozen, params, batch, scale)

    if frozen["embedding"].dtype != jnp.float16:  # type: ignore[union-attr]
        return with_scale(1.0)

    def overflows(carry: Any) -> Array:
        scale, (loss, gradient, _) = carry
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]).all()
        return ~finite & jnp.isfinite(loss) & (scale > LEAST_SCALE)

    def again(carry: Any) -> Any:
        scale = carry[0] / SCALE_STEP
        return scale, with_scale(scale)

    zero = jnp.zeros((), jnp.float32)
    none_yet = zero, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params), zero
    start = jnp.asarray(LOSS_SCALE * SCALE_STEP, jnp.float32), none_yet
    return jax.lax.while_loop(overflows, again, start)[1]


def _scaled_loss_and_gradient(
    module: Decoder,
    method: Method,
    objective: Objective,
    frozen: Params,
    params: PromptParams,
    batch: Batch,
    scale: float | Float[Array, ""],
) -> tuple[Float[Array, ""], PromptParams, Float[Array, ""]]:
    """`loss_and_gradient`, with cotangents that are `scale` times as large on their way through the model."""

    def encode(virtual: VirtualPrompt) -> Any:
        prefix = encode_prefix(module, frozen, virtual, batch.lead_ids, batch.lead_length)
        return (None, None) if prefix is None else ((prefix.keys, prefix.values), prefix.positions)

    virtual, materialize_vjp = jax.vjp(lambda p: method.materialize(module, frozen, p), params)
    keys_values, encode_vjp, positions = jax.vjp(encode, virtual, has_aux=True)

    def rows_loss(keys_values: Any, virtual: VirtualPrompt, rows: Rows) -> tuple[Array, Array]:
        prefix = None if keys_values is None else Prefix(keys_values[0], keys_values[1], positions)
        scores = target_scores(module, frozen, virtual, prefix, rows)
        return LOSSES[objective.over](scores, rows, objective.choices, objective.label_smoothing)

    def accumulate(carry: Any, rows: Rows) -> tuple[Any, None]:
        of_rows = functools.partial(rows_loss, rows=rows)
        loss, pull, weight = jax.vjp(of_rows, keys_values, virtual, has_aux=True)
        return jax.tree.map(jnp.add, carry, ((loss, weight), pull(seed))), None

    zero, seed = jnp.zeros((), jnp.float32), jnp.asarray(scale, jnp.float32)
    nothing = ((zero, zero), jax.tree.map(jnp.zeros_like, (keys_values, virtual)))
    microbatches = _split(batch.rows, objective.microbatches)
    ((total, weight), (of_prefix, of_virtual)), _ = jax.lax.scan(accumulate, nothing, microbatches)
    if method.context_targets:

        def of_context(virtual: VirtualPrompt) -> tuple[Array, Array]:
            logits = lead_logits(module, frozen, virtual, batch.lead_ids)
            return context_loss(logits, batch.lead_ids, module.config.vocab_size, method.context_targets)

        # Every example has the context before it, and what it costs.
        examples = jnp.sum(batch.rows.example_weights)
        loss, pull, count = jax.vjp(of_context, virtual, has_aux=True)
        (slope,) = pull(seed)
        total, weight = total + examples * loss, weight + examples * count
        of_virtual = jax.tree.map(lambda a, b: a + examples * b, of_virtual, slope)
    (through_prefix,) = encode_vjp(of_prefix)
    (gradient,) = materialize_vjp(jax.tree.map(jnp.add, of_virtual, through_prefix))
    weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
    return total / weight, jax.tree.map(lambda g: g / (weight * scale), gradient), weight


def _split(rows: Rows, count: int) -> Rows:
    """[B, ...] to [count, B / count, ...]. Neighbours go to different microbatches: each device keeps its own."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), rows)


def train_step(
    module: Decoder,
    method: Method,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    frozen: Params,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One optimizer step: the pure, unbound function behind `make_train_step`."""
    loss, gradient, weight = loss_and_gradient(module, method, objective, frozen, state.params, batch)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    trainable = method.trainable(state.params)
    updates = jax.tree.map(lambda update, free: update if free else jnp.zeros_like(update), updates, trainable)
    params = method.project(optax.apply_updates(state.params, updates))
    metrics = {
        "loss": loss,
        "weight": weight,
        "gradient_norm": optax.tree.norm(gradient),
        "prompt_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def make_train_step(
    base: FrozenBase, method: Method, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled step with the frozen base inside. The state given to it is donated: use the one that it returns.

    The weights are an argument of the compiled program, bound out here. Wrapping the result in another `jax.jit` would
    make them literals; jit `train_step` yourself then.
    """
    function = functools.partial(train_step, base.module, method, objective or Objective(), optimizer)
    compiled = jax.jit(function, donate_argnums=1, out_shardings=replicated(base.mesh))
    return functools.partial(compiled, base.params)
