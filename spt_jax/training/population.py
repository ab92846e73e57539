"""Trains a population: many prompts on one frozen base.

Members may differ in seed, initialization, learning rate, length or data, but share one compiled step. Each call of the
step is vectorized over a group of `group_size` members. Large groups suit accelerators, where a single prompt would
leave the device underused; on CPUs, a group size of 1 is faster. A member's losses equal those of a separate run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.models.model import Model
from spt_jax.prompts import Method, PromptParams, PromptTuning
from spt_jax.prompts.method import check_method
from spt_jax.runtime.sharding import replicated
from spt_jax.training.objectives import Objective
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer
from spt_jax.training.rollouts import Questions
from spt_jax.training.step import Metrics, TrainState, check_microbatches, train_step


@dataclasses.dataclass(frozen=True)
class Member:
    """One prompt of a population, with the settings that may differ between members.

    Attributes:
      method: the method. Within a population, methods may differ only in `init`, and for prompt tuning in length.
      examples: the data.
      plan: the shapes of batches.
      seed: the random seed of initialization and data order.
      learning_rate: the peak learning rate of the schedule.
      class_weights: a weight per class; None weights all classes equally.
      questions: for an objective that samples answers, what they are judged by.
    """

    method: Method
    examples: Sequence[Example]
    plan: BatchPlan
    seed: int
    learning_rate: float
    class_weights: Sequence[float] | None = None
    questions: Questions | None = None


def default_group_size() -> int:
    """Returns the default number of members per group: 8 on an accelerator, 1 on a CPU."""
    return 1 if jax.default_backend() == "cpu" else 8


def common_method(members: Sequence[Member]) -> Method:
    """Returns the method used to train all members: that of the longest member.

    Raises:
      ConfigError: there are no members, or their methods differ in more than initialization and length.
    """
    if not members:
        raise ConfigError("the population is empty; it needs at least one member")
    longest = max((member.method for member in members), key=lambda method: method.token_count)
    free = {name: getattr(longest, name) for name in ("init", "length") if hasattr(longest, name)}
    for number, member in enumerate(members):
        if type(member.method) is not type(longest) or dataclasses.replace(member.method, **free) != longest:
            raise ConfigError(f"member {number} has another method than the others; only init and length may differ")
        lengths = {(method.token_count, method.prefix_length) for method in (member.method, longest)}
        if len(lengths) > 1 and not isinstance(longest, PromptTuning):
            raise ConfigError(f"members of {longest.name} must be of one length; only prompt_tuning is padded")
    return longest


def aligned_plans(members: Sequence[Member]) -> list[BatchPlan]:
    """Returns the members' plans with equal row shapes, the largest of each, so that their batches can be stacked.

    Raises:
      ConfigError: the members' examples have different numbers of choices.
    """
    plans = [member.plan for member in members]
    if len({plan.choices for plan in plans}) > 1:
        raise ConfigError("members whose tasks have unequal numbers of classes cannot share a population")
    names = "length", "outputs", "targets", "examples", "decoder", "types", "inputs"
    sizes = {name: max(getattr(plan, name) for plan in plans) for name in names}
    buckets = tuple(sorted({bucket for plan in plans for bucket in plan.row_buckets}))
    return [dataclasses.replace(plan, **sizes, row_buckets=buckets) for plan in plans]


def init_members(
    base: FrozenBase, members: Sequence[Member], optimizer: OptimizerConfig, steps: int
) -> list[TrainState]:
    """Initializes the state of each member.

    Parameters of shorter members are padded with zero rows, which are unused and receive no gradient.

    Raises:
      ConfigError: the members are not compatible, or have different lengths, which the optimizer does not support.
    """
    longest = common_method(members).token_count
    if optimizer.name == "adafactor" and any(member.method.token_count < longest for member in members):
        raise ConfigError("adafactor's updates depend on padding; members of unequal length need another optimizer")
    make = make_optimizer(optimizer, steps)
    states = []
    for member in members:
        check_method(member.method, base)
        params = member.method.init_params(jax.random.key(member.seed), base)
        if member.method.token_count < longest:
            missing = longest - member.method.token_count
            params = {**params, "tokens": jnp.pad(params["tokens"], ((0, missing), (0, 0)))}
        states.append(TrainState(jnp.zeros((), jnp.int32), params, make.init(params)))
    return jax.device_put(states, replicated(base.mesh))


def own_params(params: PromptParams, method: Method) -> PromptParams:
    """Returns a member's parameters on the host, without padding."""
    host = jax.tree.map(np.asarray, params)
    return {**host, "tokens": host["tokens"][: method.token_count]} if isinstance(method, PromptTuning) else host


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Stacks batches of aligned plans along a new first axis G; leading ids are padded on the right if necessary."""
    lengths = [batch.lead_ids.shape[0] for batch in batches]
    if len(set(lengths)) > 1:
        batches = [_with_lead(batch, max(lengths)) for batch in batches]
    most = max(len(batch.rows.ids) for batch in batches)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(_with_rows(batch, most) for batch in batches))


def _with_lead(batch: Batch, length: int) -> Batch:
    """Pads the leading ids of a batch to `length`."""
    real = len(batch.lead_ids)
    ids: Any = np.pad(batch.lead_ids, (0, length - real))
    return Batch(ids, batch.rows, np.asarray(real, np.int32))  # type: ignore[arg-type]


def _with_rows(batch: Batch, count: int) -> Batch:
    """Pads a batch with empty rows to `count` rows."""

    def pad(array: Any, fill: int = 0) -> np.ndarray:
        return np.pad(array, [(0, count - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=fill)

    rows = dataclasses.replace(jax.tree.map(pad, batch.rows), examples=pad(batch.rows.examples, -1))
    return dataclasses.replace(batch, rows=rows)


def population_step(
    method: Method,
    objective: Objective,
    optimizer: OptimizerConfig,
    steps: int,
    model: Model,
    states: Sequence[TrainState],
    rates: Float[Array, " G"],
    batches: Batch,
    microbatches: int = 1,
) -> tuple[list[TrainState], dict[str, Float[Array, " G"]]]:
    """Takes one step of G members, each with a separate state, rate and batch.

    The function is pure: jit it with `model` as an argument.

    Args:
      method: the result of `common_method`.
      objective: the loss.
      optimizer: the optimizer, which all members share.
      steps: the length of the run in steps, which determines the schedule.
      model: the base.
      states: the members' states.
      rates: the members' peak learning rates.
      batches: the members' batches, stacked by `stack_batches`.
      microbatches: the number of parts that each batch is split into.

    Returns:
      The members' states and their metrics [G].
    """

    def of_member(state: TrainState, rate: Array, batch: Batch) -> tuple[TrainState, Metrics]:
        own = make_optimizer(optimizer, steps, rate)
        return train_step(method, objective, own, model, state, batch, microbatches)

    inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), rates, batches
    if len(states) == 1:  # not vectorized, so the program is the same as in a separate run
        state, metrics = of_member(*jax.tree.map(lambda leaf: leaf[0], inputs))
        return [state], jax.tree.map(lambda leaf: leaf[None], metrics)
    stacked, metrics = jax.vmap(of_member)(*inputs)
    return [jax.tree.map(lambda leaf, g=g: leaf[g], stacked) for g in range(len(states))], metrics


def make_population_step(
    base: FrozenBase,
    method: Method,
    optimizer: OptimizerConfig,
    steps: int,
    objective: Objective,
    microbatches: int = 1,
) -> Callable[..., tuple[list[TrainState], Metrics]]:
    """Returns a compiled `population_step` bound to a frozen base. It donates the states that it is called with.

    Args:
      base: the frozen base.
      method: the result of `common_method`.
      optimizer: the optimizer, which all members share.
      steps: the length of the run in steps.
      objective: the loss.
      microbatches: the number of parts that each batch is split into.

    Returns:
      A function of the members' states, rates and batches, as in `population_step`.

    Raises:
      ConfigError: the number of microbatches is below 1.
    """
    check_microbatches(microbatches)
    function = functools.partial(population_step, method, objective, optimizer, steps, microbatches=microbatches)
    compiled = jax.jit(function, donate_argnames="states", out_shardings=replicated(base.mesh))
    return functools.partial(compiled, base.model)
