"""Trains a population, optionally with successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, place_batch
from spt_jax.data.streams import training_batches
from spt_jax.errors import ConfigError
from spt_jax.prompts import PromptParams
from spt_jax.runtime.progress import say
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import MetricsLog, NoLog, shortest
from spt_jax.training.loop import Events, GroupMetrics, Standing, TrainingRun, train
from spt_jax.training.objectives import Grpo, Objective, prepare_examples
from spt_jax.training.optimizers import OptimizerConfig, learning_rates
from spt_jax.training.population import (
    Member,
    aligned_plans,
    common_method,
    default_group_size,
    init_members,
    make_population_step,
    own_params,
    stack_batches,
)
from spt_jax.training.rollouts import ROLLOUT_METRICS, RolloutBatches, rollout_batches
from spt_jax.training.step import TrainState
from spt_jax.training.streams import Batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Options of successive halving.

    Attributes:
      rungs: the shares of the run after which the worst members are stopped; if empty, all members finish.
      keep: the share of members that continues after each rung, ranked by their latest validation.
    """

    rungs: tuple[float, ...] = (0.125, 0.25, 0.5)
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 < rung < 1 for rung in self.rungs) or sorted(set(self.rungs)) != list(self.rungs):
            raise ConfigError(f"halving.rungs are {self.rungs}; they must be ascending shares between 0 and 1")
        if not 0 < self.keep < 1:
            raise ConfigError(f"halving.keep is {self.keep}; it must be between 0 and 1")

    def steps(self, run: int) -> list[int]:
        """Returns the rungs as steps of a run of `run` steps.

        Args:
          run: the length of the run in steps.
        """
        return sorted({max(1, round(rung * run)) for rung in self.rungs})


class _Events(Events):
    """Logs the losses and validation metrics of all members, and drops a member whose metrics are not finite."""

    def __init__(self, names: Sequence[str] | None, rates: Sequence[Sequence[float]]):
        self._names = names
        self._rates = rates

    def trained(self, log: MetricsLog, step: int, values: Mapping[int, Mapping[str, float]]) -> None:
        known = {name for own in values.values() for name in own}
        sampled = sorted(name for name in known if name in ROLLOUT_METRICS or name.startswith("reward/"))
        measured = [own["tokens_per_second"] for own in values.values() if "tokens_per_second" in own]
        log.write(
            step,
            {
                "loss": {str(number): own["loss"] for number, own in values.items()},
                "learning_rate": {str(number): self._rates[number][step - 1] for number in values},
                **{name: {str(number): own[name] for number, own in values.items()} for name in sampled},
                **({"tokens_per_second": measured[0]} if measured else {}),
            },
        )

    def validated(self, log: MetricsLog, step: int, member: int, metrics: Mapping[str, Any]) -> None:
        log.write(step, {"validation": {str(member): dict(metrics)}})

    def failed(self, member: int, step: int, problem: str) -> str:
        ended = f"dropped at step {step}: {problem}"
        say(f"{self._names[member] if self._names else f'member {member}'} is {ended}")
        return ended


def _streams(base: FrozenBase, members: Sequence[Member], objective: Objective, batch_size: int) -> list[Batches]:
    """Returns the stream of batches of each member: of its examples, or of answers that its prompt samples."""
    plans = aligned_plans(members)
    if isinstance(objective, Grpo):
        return [
            rollout_batches(
                base,
                own.method,
                objective,
                own.examples,
                plan,
                own.questions,
                batch_size=batch_size,
                seed=own.seed,
                member=number,
            )
            for number, (own, plan) in enumerate(zip(members, plans, strict=True))
        ]
    sources = {id(member.examples): member.examples for member in members}  # members may share their examples
    examples = {key: prepare_examples(objective, base, source) for key, source in sources.items()}
    return [
        training_batches(
            examples[id(own.examples)], plan, batch_size=batch_size, seed=own.seed, class_weights=own.class_weights
        )
        for own, plan in zip(members, plans, strict=True)
    ]


def _sampled(streams: Sequence[Batches]) -> dict[str, Array]:
    """Returns the metrics [G] of the answers that members sampled; none for another objective."""
    found = [stream.metrics for stream in streams if isinstance(stream, RolloutBatches)]
    return {name: jnp.asarray([own[name] for own in found]) for name in (found[0] if found else ())}


def _rates(member: Member, optimizer: OptimizerConfig, steps: int) -> list[float]:
    return shortest(learning_rates(optimizer, steps, member.learning_rate))


def fit_population(
    base: FrozenBase,
    members: Sequence[Member],
    optimizer: OptimizerConfig,
    objective: Objective,
    config: TrainConfig,
    *,
    workdir: str | Path,
    validate: Callable[[int, PromptParams], Mapping[str, Any]],
    halving: Halving | None = None,
    group_size: int | None = None,
    log: Callable[[int], MetricsLog] | None = None,
    metadata: Mapping[str, Any] | None = None,
    resume: bool = False,
    names: Sequence[str] | None = None,
) -> list[Standing]:
    """Trains each member until the last step, or until it is stopped.

    Args:
      base: the frozen base.
      members: the members.
      optimizer: a resolved config; its learning rate is replaced by the members' rates.
      objective: the loss.
      config: steps, batch size, validation, patience and checkpoints of all members; its seed is not used.
      workdir: the directory in which checkpoints are stored.
      validate: returns metrics on the validation set, given a member's number and parameters.
      halving: options of successive halving; by default, no member is halved.
      group_size: the number of members per call of the step; the default depends on the device.
      log: opens the metrics log at the step from which the run starts or resumes; by default, nothing is logged.
      metadata: plain JSON that is stored in each checkpoint.
      resume: whether to resume, bit for bit, from the newest intact checkpoint in workdir.
      names: the members' names in messages; by default, their numbers from 0.

    Returns:
      The final standing of each member. A member whose metrics are not finite is dropped, and keeps its best prompt.

    Raises:
      ConfigError: the members are not compatible, or one has no questions for an objective that samples answers.
      CheckpointError: a checkpoint cannot be written or read.
      RewardError: the reward functions failed for too many answers of a member; the states of all are saved.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    method, size = common_method(members), group_size or default_group_size()
    if size < 1:
        raise ConfigError(f"group_size is {size}; it must be at least 1")
    config = config.resolved()
    rungs = [] if halving is None else halving.steps(config.steps)
    streams = _streams(base, members, objective, config.batch_size)
    step = make_population_step(base, method, optimizer, config.steps, objective, config.microbatches)

    def advance(
        numbers: Sequence[int], states: Sequence[TrainState], batches: Sequence[Batch]
    ) -> tuple[Sequence[TrainState], GroupMetrics]:
        rates = np.asarray([members[number].learning_rate for number in numbers], np.float32)
        new, metrics = step(states, rates, place_batch(stack_batches(batches), base.mesh, stacked=True))
        return new, {**metrics, **_sampled([streams[number] for number in numbers])}

    run = TrainingRun(
        base=base,
        states=init_members(base, members, optimizer, config.steps),
        batches=streams,
        advance=advance,
        config=config,
        workdir=Path(workdir),
        log=log or (lambda _: NoLog()),
        events=_Events(names, [_rates(member, optimizer, config.steps) for member in members]),
        validate=lambda number, params: validate(number, own_params(params, members[number].method)),
        prefix_length=method.prefix_length,
        group_size=size,
        rungs=rungs,
        keep=1.0 if halving is None else halving.keep,
        metadata=metadata or {},
    )
    standings, _, _ = train(run, resume=resume)
    return [
        dataclasses.replace(
            standing, best=dataclasses.replace(standing.best, params=own_params(standing.best.params, member.method))
        )
        for standing, member in zip(standings, members, strict=True)
    ]
