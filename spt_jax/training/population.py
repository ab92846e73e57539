"""Many prompts trained side by side on one frozen base: a population.

Members differ in seed, start, learning rate, length or data, and are compiled once for all. They take turns in groups
of `group_size`, each group one call of a step that is mapped over its members: large on an accelerator, which a single
prompt leaves idle, and 1 on a CPU, which is faster one by one. A member's losses are those of a run of its own.
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
from spt_jax.bases.checkpoint import Params
from spt_jax.data.batches import Batch, BatchPlan
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.models.decoder import Decoder
from spt_jax.prompts import Method, PromptParams, PromptTuning
from spt_jax.runtime.sharding import replicated
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer
from spt_jax.training.step import Metrics, Objective, TrainState, train_step


@dataclasses.dataclass(frozen=True)
class Member:
    """One prompt of a population: what may differ from the others.

    method: those of a population differ in their start (`init`) alone, and in length if they are prompt tuning.
    examples, plan: its data, and the shapes of its batches.
    seed: of its start and of the order of its data.
    learning_rate: the highest of its schedule.
    class_weights: a weight per class if classes weigh differently.
    """

    method: Method
    examples: Sequence[Example]
    plan: BatchPlan
    seed: int
    learning_rate: float
    class_weights: Sequence[float] | None = None


def default_group_size() -> int:
    """How many members go through a step together: 8 on an accelerator, 1 on a CPU."""
    return 1 if jax.default_backend() == "cpu" else 8


def common_method(members: Sequence[Member]) -> Method:
    """The method that stands for all members: that of the longest.

    Raises:
      ConfigError: there are none, or they differ in more than start and length.
    """
    if not members:
        raise ConfigError("the population is empty; it needs at least one member")
    longest = max((member.method for member in members), key=lambda method: method.token_count)
    free = {name: getattr(longest, name) for name in ("init", "length") if hasattr(longest, name)}
    for number, member in enumerate(members):
        if type(member.method) is not type(longest) or dataclasses.replace(member.method, **free) != longest:
            raise ConfigError(f"member {number} has another method than the others; only start and length may differ")
        lengths = {(method.token_count, method.prefix_length) for method in (member.method, longest)}
        if len(lengths) > 1 and not isinstance(longest, PromptTuning):
            raise ConfigError(f"members of {longest.name} must be of one length; prompt_tuning alone is padded")
    return longest


def aligned_plans(members: Sequence[Member]) -> list[BatchPlan]:
    """Plans of equal row shapes, each the largest of all, so that members' batches can be stacked.

    Raises:
      ConfigError: the members' examples have unequal numbers of choices.
    """
    plans = [member.plan for member in members]
    if len({plan.choices for plan in plans}) > 1:
        raise ConfigError("members whose tasks have unequal numbers of classes cannot share a population")
    sizes = {name: max(getattr(plan, name) for plan in plans) for name in ("length", "outputs", "targets", "examples")}
    buckets = tuple(sorted({bucket for plan in plans for bucket in plan.row_buckets}))
    return [dataclasses.replace(plan, **sizes, row_buckets=buckets) for plan in plans]


def init_members(
    base: FrozenBase, members: Sequence[Member], optimizer: OptimizerConfig, steps: int
) -> list[TrainState]:
    """Every member's fresh state.

    Parameters of shorter members are padded with zero rows, which no template names and no gradient reaches.

    Raises:
      ConfigError: the members do not go together, or their lengths not with the optimizer.
    """
    longest = common_method(members).token_count
    if optimizer.name == "adafactor" and any(member.method.token_count < longest for member in members):
        raise ConfigError("adafactor's updates depend on padding; members of unequal length need another optimizer")
    make = make_optimizer(optimizer, steps)
    states = []
    for member in members:
        params = member.method.init_params(jax.random.key(member.seed), base)
        if member.method.token_count < longest:
            params = {"tokens": jnp.pad(params["tokens"], ((0, longest - member.method.token_count), (0, 0)))}
        states.append(TrainState(jnp.zeros((), jnp.int32), params, make.init(params)))
    return jax.device_put(states, replicated(base.mesh))


def own_params(params: PromptParams, method: Method) -> PromptParams:
    """A member's parameters on the host, without padding."""
    own = jax.tree.map(np.asarray, params)
    return {"tokens": own["tokens"][: method.token_count]} if isinstance(method, PromptTuning) else own


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of aligned plans with an axis G in front; leading ids of unequal number are padded on the right."""
    lengths = [batch.lead_ids.shape[0] for batch in batches]
    if len(set(lengths)) > 1:
        batches = [_with_lead(batch, max(lengths)) for batch in batches]
    most = max(len(batch.rows.ids) for batch in batches)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(_with_rows(batch, most) for batch in batches))


def _with_lead(batch: Batch, length: int) -> Batch:
    """The batch with so many leading ids, the last of which are padding."""
    own = len(batch.lead_ids)
    ids: Any = np.pad(batch.lead_ids, (0, length - own))
    return Batch(ids, batch.rows, np.asarray(own, np.int32))  # type: ignore[arg-type]


def _with_rows(batch: Batch, count: int) -> Batch:
    """The batch with so many rows, the last of which are empty."""

    def pad(array: Any, fill: int = 0) -> np.ndarray:
        return np.pad(array, [(0, count - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=fill)

    rows = dataclasses.replace(jax.tree.map(pad, batch.rows), examples=pad(batch.rows.examples, -1))
    return dataclasses.replace(batch, rows=rows)


def population_step(
    module: Decoder,
    method: Method,
    objective: Objective,
    optimizer: OptimizerConfig,
    steps: int,
    frozen: Params,
    states: Sequence[TrainState],
    rates: Float[Array, " G"],
    batches: Batch,
) -> tuple[list[TrainState], dict[str, Float[Array, " G"]]]:
    """One step of G members, each with its own state, rate and batch. Pure: jit it with `frozen` as an argument.

    Args:
      method: `common_method`'s.
      optimizer, steps: what all share but the rate.
      batches: with an axis G in front, as `stack_batches` makes it.

    Returns:
      The members' states and their metrics [G].
    """

    def of_member(state: TrainState, rate: Array, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(module, method, objective, make_optimizer(optimizer, steps, rate), frozen, state, batch)

    inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), rates, batches
    if len(states) == 1:  # the very program of a run of its own
        state, metrics = of_member(*jax.tree.map(lambda leaf: leaf[0], inputs))
        return [state], jax.tree.map(lambda leaf: leaf[None], metrics)
    stacked, metrics = jax.vmap(of_member)(*inputs)
    return [jax.tree.map(lambda leaf, g=g: leaf[g], stacked) for g in range(len(states))], metrics


def make_population_step(
    base: FrozenBase, method: Method, optimizer: OptimizerConfig, steps: int, objective: Objective
) -> Callable[..., tuple[list[TrainState], Metrics]]:
    """`population_step` compiled around the frozen base. The states given to it are donated."""
    function = functools.partial(population_step, base.module, method, objective, optimizer, steps)
    compiled = jax.jit(function, donate_argnums=1, out_shardings=replicated(base.mesh))
    return functools.partial(compiled, base.params)
