"""Trains a population, optionally with successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943)."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import place_batch, training_batches
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.prompts import PromptParams
from spt_jax.training.checkpoints import Checkpoints
from spt_jax.training.config import TrainConfig
from spt_jax.training.logs import MetricsLog, NoLog
from spt_jax.training.loop import Best, Stopped, graceful_stop, progress_bar
from spt_jax.training.objectives import Objective, prepare_examples
from spt_jax.training.optimizers import OptimizerConfig
from spt_jax.training.overflow import explain
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
from spt_jax.training.step import TrainState


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
        """Returns the rungs as steps of a run of `run` steps."""
        return sorted({max(1, round(rung * run)) for rung in self.rungs})


@dataclasses.dataclass(frozen=True)
class Standing:
    """The progress of a member.

    Attributes:
      best: its best prompt by validation.
      steps: the number of steps done.
      score: the score of its latest validation; higher is better.
      ended: why it stopped; None while it is training.
    """

    best: Best
    steps: int = 0
    score: float = -math.inf
    ended: str | None = None


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
      ConfigError: the members are not compatible.
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    method, size = common_method(members), group_size or default_group_size()
    if size < 1:
        raise ConfigError(f"group_size is {size}; it must be at least 1")
    config = config.resolved()
    rungs = [] if halving is None else halving.steps(config.steps)
    states = init_members(base, members, optimizer, config.steps)
    plans = aligned_plans(members)
    sources = {id(member.examples): member.examples for member in members}  # members may share their examples
    examples = {key: prepare_examples(objective, base, source) for key, source in sources.items()}
    streams = [
        training_batches(
            examples[id(member.examples)],
            plan,
            batch_size=config.batch_size,
            seed=member.seed,
            class_weights=member.class_weights,
        )
        for member, plan in zip(members, plans, strict=True)
    ]
    standings = [Standing(Best(jax.tree.map(np.asarray, state.params))) for state in states]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(Path(workdir) / "checkpoints", keep=config.keep))
        asked_to_stop = stack.enter_context(graceful_stop())
        done = 0
        if resume:
            like = _stacked(0, states, standings)
            restored = checkpoints.restore_intact(None, lambda step: checkpoints.restore(step, like))
            if restored is not None:
                stacked, data_states, saved = restored
                done, states, standings = _unstacked(stacked, saved["standings"])
                for stream, state in zip(streams, data_states, strict=True):
                    stream.set_state(state)
        checkpoints.remove_cut_off_saves()
        metrics_log = stack.enter_context(contextlib.closing(NoLog() if log is None else log(done)))
        bar = stack.enter_context(progress_bar(config.steps, done))
        step = make_population_step(base, method, optimizer, config.steps, objective, config.microbatches)
        pending: list[tuple[list[int], Any]] = []

        def settle() -> None:
            """Reads the metrics of the last step, and drops members whose metrics are not finite."""
            losses = {}
            for numbers, metrics in pending:
                values = {name: np.asarray(value) for name, value in metrics.items()}
                for slot, number in enumerate(numbers):
                    if standings[number].ended is not None:
                        continue  # the member was dropped after this step had been dispatched
                    at = standings[number].steps
                    member_values = {name: float(value[slot]) for name, value in values.items()}
                    problem = explain(at, member_values, base.dtype)
                    if problem is not None:
                        ended = f"dropped at step {at}: {problem}"
                        standings[number] = dataclasses.replace(standings[number], ended=ended)
                        tqdm.write(f"{names[number] if names else f'member {number}'} is {ended}")
                    else:
                        losses[str(number)] = float(values["loss"][slot])
            if pending:
                metrics_log.write(done, {"loss": losses})
            pending.clear()

        def save() -> None:
            details = [_described(standing) for standing in standings]
            data_states = [stream.get_state() for stream in streams]
            metrics_log.sync()
            checkpoints.save(_stacked(done, states, standings), data_states, {**(metadata or {}), "standings": details})

        while done < config.steps and (racing := _racing(standings)):
            dispatched = []
            for numbers in _groups(racing, size):
                batch = place_batch(stack_batches([next(streams[n]) for n in numbers]), base.mesh, stacked=True)
                rates = np.asarray([members[n].learning_rate for n in numbers], np.float32)
                new, metrics = step([states[n] for n in numbers], rates, batch)
                for number, state in zip(numbers, new, strict=True):
                    states[number] = state
                dispatched.append((numbers, metrics))
            settle()
            done += 1
            pending.extend(dispatched)
            standings = [
                standing if standing.ended else dataclasses.replace(standing, steps=done) for standing in standings
            ]
            bar.update(1)
            last, stop = done == config.steps, asked_to_stop(done)
            if done % config.evaluate_every == 0 or done in rungs or last:  # type: ignore[operator]
                settle()
                for number in _racing(standings):
                    params = own_params(states[number].params, members[number].method)
                    result = validate(number, params)
                    metrics_log.write(done, {"validation": {str(number): dict(result)}})
                    standings[number] = _validated(
                        standings[number], states[number].params, done, result, config.patience
                    )
            if done in rungs and halving is not None:
                standings = _halved(standings, halving.keep, done)
            if done % config.checkpoint_every == 0 or last or stop is not None:  # type: ignore[operator]
                settle()
                save()
            if stop is not None:
                checkpoints.wait()
                raise Stopped(stop, done)
        checkpoints.wait()
    stop = asked_to_stop(done + 1)  # during the last validation or save, or while the logs were closed
    if stop is not None:
        raise Stopped(stop, done)
    return [
        dataclasses.replace(
            standing,
            best=dataclasses.replace(standing.best, params=own_params(standing.best.params, member.method)),
            ended=standing.ended or "finished",
        )
        for standing, member in zip(standings, members, strict=True)
    ]


def _racing(standings: Sequence[Standing]) -> list[int]:
    return [number for number, standing in enumerate(standings) if standing.ended is None]


def _groups(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])


def _validated(
    standing: Standing, params: PromptParams, step: int, result: Mapping[str, Any], patience: int
) -> Standing:
    score = selection_score(result)
    if score <= standing.best.score:
        best = dataclasses.replace(standing.best, since=standing.best.since + 1)
        ended = f"out of patience at step {step}" if 0 < patience <= best.since else None
        return dataclasses.replace(standing, score=score, best=best, ended=ended)
    return dataclasses.replace(standing, score=score, best=Best(jax.tree.map(np.asarray, params), step, dict(result)))


def _halved(standings: Sequence[Standing], keep: float, step: int) -> list[Standing]:
    """Stops the active members below the best `keep` share; ties are decided for the earlier member."""
    racing = _racing(standings)
    ranked = sorted(racing, key=lambda number: -standings[number].score)
    losers = set(ranked[math.ceil(keep * len(ranked)) :])
    return [
        dataclasses.replace(standing, ended=f"halved at step {step}") if number in losers else standing
        for number, standing in enumerate(standings)
    ]


def _stacked(step: int, states: Sequence[TrainState], standings: Sequence[Standing]) -> TrainState:
    """Returns all arrays of a checkpoint, stacked over members along the first axis."""
    params, optimizer_states = [state.params for state in states], [state.optimizer_state for state in states]
    together = {
        "now": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params),
        "best": jax.tree.map(lambda *leaves: np.stack(leaves), *(standing.best.params for standing in standings)),
    }
    sharding = jax.tree.leaves(params)[0].sharding
    stacked: Any = TrainState(
        jnp.asarray(step, jnp.int32), together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *optimizer_states)
    )
    return jax.device_put(stacked, sharding)


def _unstacked(
    stacked: TrainState, details: Sequence[Mapping[str, Any]]
) -> tuple[int, list[TrainState], list[Standing]]:
    states, standings = [], []
    for number, detail in enumerate(details):

        def of_member(tree: Any, number: int = number) -> Any:
            return jax.tree.map(lambda leaf: leaf[number], tree)

        step = jnp.asarray(detail["steps"], jnp.int32)
        states.append(TrainState(step, of_member(stacked.params["now"]), of_member(stacked.optimizer_state)))
        params = jax.tree.map(np.asarray, of_member(stacked.params["best"]))
        best = Best(params, detail["best_step"], detail["metrics"], detail["since"])
        score = -math.inf if detail["score"] is None else detail["score"]
        standings.append(Standing(best, detail["steps"], score, detail["ended"]))
    return int(stacked.step), states, standings


def _described(standing: Standing) -> dict[str, Any]:
    """Returns the metadata of a member in a checkpoint."""
    return {
        "steps": standing.steps,
        "score": None if standing.score == -math.inf else standing.score,
        "ended": standing.ended,
        "best_step": standing.best.step,
        "metrics": standing.best.metrics,
        "since": standing.best.since,
    }
