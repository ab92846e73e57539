"""The training step, which differentiates with respect to the prompt's parameters only.

    params --materialize--> VirtualPrompt --run_lead--> Prefix --rows--> loss
               (vjp once)                   (vjp once)      (scan over microbatches)

The leading ids that all examples share go through the model once per step, whatever the number of rows and
microbatches. The cotangents of their memory, and those of virtual tokens elsewhere, are summed over
microbatches and propagated back once. A method's auxiliary objective is computed from the hidden states of that run.
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
from spt_jax.data.batches import Batch, Rows
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import run_lead, target_scores
from spt_jax.models.attention import Prefix
from spt_jax.models.memory import Memory
from spt_jax.models.model import Model
from spt_jax.prompts import Method, PromptParams, VirtualPrompt
from spt_jax.prompts.method import check_method
from spt_jax.runtime.sharding import replicated
from spt_jax.training.objectives import CrossEntropy, Objective

Metrics = dict[str, Float[Array, ""]]

# The initial loss scale for a float16 base. Unscaled cotangents are gradients of a sum over targets, of the order of an
# embedding's entries, and many would be below the smallest normal number, 6e-5. The largest number is 65504.
LOSS_SCALE = 2.0**8
SCALE_STEP = 2.0**8
LEAST_SCALE = 2.0**-16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step updates.

    Attributes:
      step: the number of optimizer steps done.
      params: the prompt's parameters, in float32.
      optimizer_state: the state of the optimizer.
    """

    step: Int[Array, ""]
    params: PromptParams
    optimizer_state: PyTree


def init_state(
    key: Key[Array, ""], base: FrozenBase, method: Method, optimizer: optax.GradientTransformation
) -> TrainState:
    """Initializes parameters and optimizer state, replicated over the base's mesh.

    Args:
      key: a typed PRNG key.
      base: the frozen base.
      method: the method.
      optimizer: a gradient transformation of optax, as from `make_optimizer`.

    Returns:
      The state before the first step.

    Raises:
      ConfigError: the options of the method are not compatible with the base.
    """
    check_method(method, base)
    params = method.init_params(key, base)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    return jax.device_put(state, replicated(base.mesh))


def check_microbatches(microbatches: int) -> None:
    """Checks a number of microbatches.

    Raises:
      ConfigError: it is below 1.
    """
    if microbatches < 1:
        raise ConfigError(f"microbatches is {microbatches}; it must be at least 1")


def loss_and_gradient(
    method: Method,
    objective: Objective,
    model: Model,
    params: PromptParams,
    batch: Batch,
    microbatches: int = 1,
) -> tuple[Float[Array, ""], PromptParams, Float[Array, ""]]:
    """Returns the mean loss of a batch, its gradient for the prompt's parameters, and the total weight of the mean.

    The function is pure, for use in custom loops: jit it with `model` as an argument. The batch is processed in
    `microbatches` parts, one after another, which saves memory and does not change the result.

    In a float16 base, small cotangents would underflow. The loss is therefore scaled by `LOSS_SCALE` (Micikevicius et
    al. 2018, arXiv 1710.03740). If the gradient overflows, it is recomputed with smaller scales, so no update is
    skipped, and a step depends only on its state and batch.

    Args:
      method: the method.
      objective: the loss.
      model: that of the base.
      params: the prompt's parameters.
      batch: a batch on the base's mesh, as from `place_batch`.
      microbatches: the number of parts.

    Returns:
      The loss, float32; the gradient, with the structure of `params`; and the weight, float32.

    Raises:
      ConfigError: the rows cannot be split into `microbatches` parts, or the method's auxiliary objective needs leading
        ids, and the batch has none.
    """
    return measured_gradient(method, objective, model, params, batch, microbatches)[:3]


def measured_gradient(
    method: Method,
    objective: Objective,
    model: Model,
    params: PromptParams,
    batch: Batch,
    microbatches: int = 1,
) -> tuple[Float[Array, ""], PromptParams, Float[Array, ""], Metrics]:
    """Returns the result of `loss_and_gradient`, and the metrics of the objective. The arguments are the same.

    Raises:
      ConfigError: as in `loss_and_gradient`.
    """
    check_microbatches(microbatches)

    def with_scale(scale: Any) -> tuple[Array, PromptParams, Array, Metrics]:
        return _scaled_loss_and_gradient(method, objective, model, params, batch, microbatches, scale)

    if model.dtype != jnp.float16:
        return with_scale(1.0)

    def overflows(carry: Any) -> Array:
        scale, (loss, gradient, *_) = carry
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]).all()
        return ~finite & jnp.isfinite(loss) & (scale > LEAST_SCALE)

    def retry(carry: Any) -> Any:
        scale = carry[0] / SCALE_STEP
        return scale, with_scale(scale)

    zero = jnp.zeros((), jnp.float32)
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    placeholder = zero, nothing, zero, dict.fromkeys(objective.metric_names, zero)
    start = jnp.asarray(LOSS_SCALE * SCALE_STEP, jnp.float32), placeholder
    return jax.lax.while_loop(overflows, retry, start)[1]


def _scaled_loss_and_gradient(
    method: Method,
    objective: Objective,
    model: Model,
    params: PromptParams,
    batch: Batch,
    microbatches: int,
    scale: float | Float[Array, ""],
) -> tuple[Float[Array, ""], PromptParams, Float[Array, ""], Metrics]:
    """`measured_gradient`, with cotangents scaled by `scale` in the backward pass."""
    auxiliary = method.auxiliary()
    if auxiliary is not None and not batch.lead_ids.shape[-1]:
        raise ConfigError(f"{method.name} has a loss on the leading ids, and the batch has none: plan with a lead")

    def encode(virtual: VirtualPrompt) -> Any:
        prefix, hidden = run_lead(
            model, virtual, batch.lead_ids, batch.lead_length, return_hidden=auxiliary is not None
        )
        if prefix is None:
            return (None, hidden), None
        return (prefix.memory, hidden), (prefix.positions, prefix.pinned)

    virtual, materialize_vjp = jax.vjp(lambda p: method.materialize(p, model), params)
    if virtual.pinned is not method.pins:
        raise ConfigError(f"{method.name} does not pin its prompt: its `materialize` must return `pinned=self.pins`")
    (memory, lead_hidden), encode_vjp, places = jax.vjp(encode, virtual, has_aux=True)

    def rows_loss(memory: Memory | None, virtual: VirtualPrompt, rows: Rows) -> tuple[Array, tuple[Array, Any]]:
        prefix = None if memory is None else Prefix(memory, *places)
        scores = target_scores(model, virtual, prefix, rows, objective.scored_ids(rows), objective.teacher(rows))
        loss, weight = objective.loss(scores, rows)
        return loss, (weight, dict(objective.metrics(scores, rows)))

    def accumulate(carry: Any, rows: Rows) -> tuple[Any, None]:
        of_rows = functools.partial(rows_loss, rows=rows)
        loss, pull, (weight, measured) = jax.vjp(of_rows, memory, virtual, has_aux=True)
        return jax.tree.map(jnp.add, carry, ((loss, weight, measured), pull(seed))), None

    zero, seed = jnp.zeros((), jnp.float32), jnp.asarray(scale, jnp.float32)
    sums = zero, zero, dict.fromkeys(objective.metric_names, (zero, zero))
    zeros = (sums, jax.tree.map(jnp.zeros_like, (memory, virtual)))
    parts = _split(batch.rows, microbatches)
    ((total, weight, measured), (of_prefix, of_virtual)), _ = jax.lax.scan(accumulate, zeros, parts)
    of_hidden = None
    if auxiliary is not None:

        def lead_loss(hidden: Float[Array, "P D"]) -> tuple[Array, Array]:
            targets = auxiliary.targets(batch.lead_ids, model.layout.vocab_size)
            return auxiliary.loss(model.scores(hidden[None], targets.outputs, targets.ids), targets)

        # The leading ids precede each example, so their loss counts once per example.
        examples = jnp.sum(batch.rows.example_weights)
        loss, pull, count = jax.vjp(lead_loss, lead_hidden, has_aux=True)
        (of_hidden,) = pull(seed * examples)
        total, weight = total + examples * loss, weight + examples * count
    (through_prefix,) = encode_vjp((of_prefix, of_hidden))
    (gradient,) = materialize_vjp(jax.tree.map(jnp.add, of_virtual, through_prefix))
    least = jnp.finfo(jnp.float32).tiny
    weight = jnp.maximum(weight, least)
    metrics = {name: amount / jnp.maximum(own, least) for name, (amount, own) in measured.items()}
    return total / weight, jax.tree.map(lambda g: g / (weight * scale), gradient), weight, metrics


def _split(rows: Rows, count: int) -> Rows:
    """Reshapes [B, ...] to [count, B / count, ...].

    Neighboring rows go to different microbatches, so that each row stays on its device.

    Raises:
      ConfigError: B is not a multiple of `count`.
    """
    if len(rows.ids) % count:
        raise ConfigError(
            f"{len(rows.ids)} rows cannot be split into {count} microbatches; plan batches with a multiple of {count}"
        )
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), rows)


def train_step(
    method: Method,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    model: Model,
    state: TrainState,
    batch: Batch,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step. `make_train_step` compiles this pure function.

    Args:
      method: the method.
      objective: the loss.
      optimizer: the gradient transformation that the state was made with.
      model: that of the base.
      state: the state before the step.
      batch: a batch on the base's mesh, as from `place_batch`.
      microbatches: as in `loss_and_gradient`.

    Returns:
      The state after the step, and its metrics, such as "loss" and those of the objective.

    Raises:
      ConfigError: as in `loss_and_gradient`.
    """
    loss, gradient, weight, measured = measured_gradient(method, objective, model, state.params, batch, microbatches)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    trainable = method.trainable(state.params)
    updates = jax.tree.map(lambda update, free: update if free else jnp.zeros_like(update), updates, trainable)
    params = method.project(optax.apply_updates(state.params, updates))
    metrics = {
        "loss": loss,
        "weight": weight,
        "gradient_norm": optax.tree.norm(gradient),
        "prompt_norm": optax.tree.norm(params),
        **measured,
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def make_train_step(
    base: FrozenBase,
    method: Method,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    microbatches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns a compiled `train_step` bound to a frozen base. It donates its state: use the one that it returns.

    The default objective is `CrossEntropy`.

    The weights are an argument of the compiled program. Wrapping the result in another `jax.jit` would make them
    literals; jit `train_step` instead in that case.

    Args:
      base: the frozen base.
      method: the method.
      optimizer: a gradient transformation of optax, as from `make_optimizer`.
      objective: the loss.
      microbatches: as in `loss_and_gradient`.

    Returns:
      A function of a state and a batch, which returns the next state and the metrics.

    Raises:
      ConfigError: the number of microbatches is below 1.
    """
    return functools.partial(jit_train_step(base, method, optimizer, objective, microbatches), base.model)


def jit_train_step(
    base: FrozenBase,
    method: Method,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    microbatches: int = 1,
) -> jax.stages.Wrapped:
    """Returns `train_step`, jitted, as a function of the model of the base, a state, which is donated, and a batch.

    Arguments and errors are those of `make_train_step`.
    """
    check_microbatches(microbatches)
    function = functools.partial(train_step, method, objective or CrossEntropy(), optimizer, microbatches=microbatches)
    return jax.jit(function, donate_argnames="state", out_shardings=replicated(base.mesh))
