"""The training loop of one or many prompts: progress, validation, checkpoints, and stopping without loss of state."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch
from spt_jax.errors import RewardError
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.prompts import PromptParams
from spt_jax.runtime import measure, processes, signals
from spt_jax.runtime.sharding import replicated
from spt_jax.training.checkpoints import Checkpoints, DamagedError, NoCheckpoints
from spt_jax.training.clock import Clock, Rates, Speed
from spt_jax.training.config import TrainConfig
from spt_jax.training.cost import functional_flops, step_flops, step_shape
from spt_jax.training.logs import MetricsLog
from spt_jax.training.overflow import explain
from spt_jax.training.step import TrainState
from spt_jax.training.streams import Batches, SampledBatches


class Stopped(Exception):  # noqa: N818 (not an error: the stop was requested)
    """Raised in all processes of a run when a signal requested a stop, after the state was saved."""

    all_processes = True

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


@dataclasses.dataclass(frozen=True)
class Best:
    """The best prompt so far by validation.

    Attributes:
      params: its parameters, on the host.
      step: the step after which it was validated.
      metrics: its metrics; None if nothing was validated.
      since: the number of validations since then.
    """

    params: PromptParams
    step: int = 0
    metrics: Mapping[str, Any] | None = None
    since: int = 0

    @property
    def score(self) -> float:
        return -math.inf if self.metrics is None else selection_score(self.metrics)


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


# The metrics of G members, or of one.
GroupMetrics = Mapping[str, Float[Array, "*G"]]
# Takes a step of some members, given their numbers, states and batches, and returns their states and metrics.
Advance = Callable[[Sequence[int], Sequence[TrainState], Sequence[Batch]], tuple[Sequence[TrainState], GroupMetrics]]


class Events:
    """What happens outside the loop when a member makes progress. The methods of this class do nothing."""

    def trained(self, log: MetricsLog, step: int, values: Mapping[int, Mapping[str, float]]) -> None:
        """Called with the metrics of a step of each member.

        With them are `tokens_per_second`, which is measured over all members; not in the first step of each start.
        """

    def validated(self, log: MetricsLog, step: int, member: int, metrics: Mapping[str, Any]) -> None:
        """Called with validation metrics."""

    def improved(self, member: int, best: Best) -> None:
        """Called with each new best prompt, and once more with the last one."""

    def ends(self) -> bool:
        """Returns whether the run ends with the step that is done, as if it were the last one."""
        return False

    def failed(self, member: int, step: int, problem: str) -> str:
        """Called when a metric is not finite. Raises an error, or returns why the member ended."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run of one or more members on one base.

    Attributes:
      base: the frozen base.
      states: the initial state of each member.
      batches: the training batches of each member.
      advance: takes a step of a group of members.
      config: the options of the loop, resolved.
      workdir: the directory in which checkpoints are stored; None for no checkpoints.
      log: opens the metrics log at the step from which the run starts or resumes.
      events: told what happens.
      validate: returns metrics on the validation set, given a member's number and parameters; if None, the last prompt
        counts as the best.
      prefix_length: positions of the methods' keys and values, for the count of operations.
      group_size: the number of members per call of `advance`.
      rungs: steps after which only the best members, a share of `keep`, continue.
      keep: see `rungs`.
      metadata: plain JSON that is stored in each checkpoint.
      profile: the number of steps to trace into `workdir/profile`.
      progress: whether to show progress and validations on stderr.
    """

    base: FrozenBase
    states: Sequence[TrainState]
    batches: Sequence[Batches]
    advance: Advance
    config: TrainConfig
    workdir: Path | None
    log: Callable[[int], MetricsLog]
    events: Events
    validate: Callable[[int, PromptParams], Mapping[str, Any]] | None
    prefix_length: int = 0
    group_size: int = 1
    rungs: Sequence[int] = ()
    keep: float = 1.0
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profile: int = 0
    progress: bool = True


def train(
    run: TrainingRun, *, resume: bool = False, resume_from: int | None = None
) -> tuple[list[Standing], float, Rates]:
    """Trains until `config.steps`, until every member has ended, or until a signal.

    Args:
      run: the run.
      resume: whether to resume, bit for bit, from the newest intact checkpoint in the work directory.
      resume_from: with `resume`, the step of the checkpoint to resume from instead.

    Returns:
      The final standings, the training time in seconds and the rates, over all starts of the run.

    Raises:
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    base, config, events = run.base, run.config, run.events
    states = list(run.states)
    standings = [Standing(Best(to_host(state.params))) for state in states]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            NoCheckpoints() if run.workdir is None else Checkpoints(run.workdir / "checkpoints", keep=config.keep)
        )
        asked_to_stop = stack.enter_context(graceful_stop())
        done, speed = 0, Speed()
        if resume:
            found = checkpoints.restore_intact(resume_from, lambda step: _restored(checkpoints, step, run))
            if found is not None:
                done, states, standings, data_states, speed = found
                for stream, data_state in zip(run.batches, data_states, strict=True):
                    stream.set_state(data_state)
        checkpoints.remove_cut_off_saves()
        log = stack.enter_context(contextlib.closing(run.log(done)))
        peak_flops = measure.peak_flops(base.dtype) * base.mesh.size
        clock = Clock(config.steps, done, speed, peak_flops, shown=run.progress)
        stack.callback(clock.close)
        profile = measure.Profile((run.workdir or Path()) / "profile", run.profile)
        trace = stack.enter_context(contextlib.closing(profile))
        first = done
        pending: list[tuple[int, list[tuple[list[int], GroupMetrics]], np.ndarray]] = []  # the last dispatched step

        def settle() -> None:
            """Waits for the last step and reads its metrics."""
            if not pending:
                return
            step, groups, work = pending.pop()
            values: dict[int, dict[str, float]] = {}
            for numbers, metrics in groups:
                arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in metrics.items()}
                for slot, number in enumerate(numbers):
                    if standings[number].ended is not None:
                        continue  # it ended after this step was dispatched
                    own = {name: float(array[slot]) for name, array in arrays.items()}
                    problem = explain(step, own, base.dtype)
                    if problem is None:
                        values[number] = own
                    else:
                        ended = events.failed(number, step, problem)
                        standings[number] = dataclasses.replace(standings[number], ended=ended)
            clock.count(work)
            if clock.tokens_per_second is not None:
                values = {
                    number: {**own, "tokens_per_second": clock.tokens_per_second} for number, own in values.items()
                }
            events.trained(log, step, values)
            clock.show([own["loss"] for own in values.values()])

        def save() -> Speed:
            spent = clock.speed
            with clock.pause():
                log.sync()
                details = [_described(standing) for standing in standings]
                metadata = {**run.metadata, "standings": details, "speed": dataclasses.asdict(spent)}
                data_states = [stream.get_state() for stream in run.batches]
                checkpoints.save(_stacked(done, states, standings), data_states, metadata)
            return spent

        if done == 0:
            save()
        saved = done
        while done < config.steps and (active := _active(standings)):
            trace.before_step(done - first, settle)
            dispatched, work = [], np.zeros(3)
            try:  # before any member's step, so that all are saved after the same one
                _sample(run.batches, states, active)
            except RewardError:
                settle()
                if done > saved:
                    save()
                checkpoints.wait()
                raise
            for numbers in _groups(active, run.group_size):
                batches = [next(run.batches[number]) for number in numbers]
                new, metrics = run.advance(numbers, [states[number] for number in numbers], batches)
                for number, state in zip(numbers, new, strict=True):
                    states[number] = state
                dispatched.append((numbers, metrics))
                work += sum(_work(base, run.prefix_length, batch) for batch in batches)
            settle()
            done += 1
            pending.append((done, dispatched, work))
            standings = [own if own.ended else dataclasses.replace(own, steps=done) for own in standings]
            last, stop = done == config.steps or events.ends(), asked_to_stop(done)
            if run.validate is not None and (done % config.evaluate_every == 0 or done in run.rungs or last):  # type: ignore[operator]
                settle()
                with clock.pause():
                    validated = []
                    for number in _active(standings):
                        params = to_host(states[number].params)
                        metrics = run.validate(number, params)
                        validated.append(metrics)
                        events.validated(log, done, number, metrics)
                        standings[number] = _validated(standings[number], params, done, metrics, config.patience)
                        if standings[number].best.step == done:
                            events.improved(number, standings[number].best)
                _say_validated(clock, done, validated, standings)
            last = last or events.ends()  # a validation may end the run
            if done in run.rungs:
                standings = _halved(standings, run.keep, done)
            if done % config.checkpoint_every == 0 or last or stop is not None or not _active(standings):  # type: ignore[operator]
                settle()
                speed, saved = save(), done
            if stop is not None:
                checkpoints.wait()
                raise Stopped(stop, done)
            if last:
                break
        if run.validate is None:
            standings = [
                own if own.ended else dataclasses.replace(own, best=Best(to_host(state.params), done))
                for own, state in zip(standings, states, strict=True)
            ]
        for number, own in enumerate(standings):
            if run.validate is None or own.best.metrics is not None:
                events.improved(number, own.best)
        checkpoints.wait()
    stop = asked_to_stop(done + 1)  # during the last validation or save, or while the logs were closed
    if stop is not None:
        raise Stopped(stop, done)
    finished = [dataclasses.replace(own, ended=own.ended or "finished") for own in standings]
    return finished, speed.seconds, speed.rates(clock.peak_flops)


@contextlib.contextmanager
def graceful_stop() -> Iterator[Callable[[int], int | None]]:
    """Handles SIGTERM and SIGINT gracefully; SIGINT after another signal still ends the process at once.

    If a run has several processes, either signal in one of them stops all, like SIGTERM.

    Yields:
      A function to call with the step's number after each step, and with the next number after the last step. It
      returns the signal that requested a stop, or None.
    """
    several = jax.process_count() > 1
    # With several processes, JAX handles SIGTERM itself.
    numbers = (signal.SIGINT,) if several else signals.NUMBERS
    with signals.held(numbers, lambda: signal.raise_signal(signal.SIGTERM) if several else None) as caught:

        def asked(step: int) -> int | None:
            if several:
                return signal.SIGTERM if processes.stop_asked(step) else None
            return caught[0] if caught else None

        yield asked


def to_host(params: PromptParams) -> PromptParams:
    """Returns a copy of the parameters on the host."""
    return jax.tree.map(np.asarray, params)


def _work(base: FrozenBase, prefix_length: int, batch: Batch) -> np.ndarray:
    """Returns the numbers of examples, tokens and operations of a batch."""
    shape = step_shape(batch, prefix_length)
    flops = step_flops(base.config, shape).total if base.is_decoder else functional_flops(base.parameter_count, shape)
    return np.asarray([np.sum(batch.rows.examples >= 0), np.sum(batch.rows.stream.segments > 0), flops], float)


def _sample(batches: Sequence[Batches], states: Sequence[TrainState], numbers: Sequence[int]) -> None:
    """Samples the answers that the next batches of some members hold, if an objective needs any."""
    for number in numbers:
        stream = batches[number]
        if isinstance(stream, SampledBatches):
            stream.sample(states[number].params)


def _active(standings: Sequence[Standing]) -> list[int]:
    return [number for number, standing in enumerate(standings) if standing.ended is None]


def _groups(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])


def _validated(
    standing: Standing, params: PromptParams, step: int, metrics: Mapping[str, Any], patience: int
) -> Standing:
    score = selection_score(metrics)
    if score <= standing.best.score:
        best = dataclasses.replace(standing.best, since=standing.best.since + 1)
        ended = f"out of patience at step {step}" if 0 < patience <= best.since else None
        return dataclasses.replace(standing, score=score, best=best, ended=ended)
    return dataclasses.replace(standing, score=score, best=Best(params, step, dict(metrics)))


def _say_validated(
    clock: Clock, step: int, metrics: Sequence[Mapping[str, Any]], standings: Sequence[Standing]
) -> None:
    best = max((standing.best for standing in standings), key=lambda best: best.score)
    if metrics and best.metrics is not None:
        clock.say_validated(step, metrics, best.metrics, best.step)


def _halved(standings: Sequence[Standing], keep: float, step: int) -> list[Standing]:
    """Stops the active members below the best `keep` share; ties are decided for the earlier member."""
    active = _active(standings)
    ranked = sorted(active, key=lambda number: -standings[number].score)
    losers = set(ranked[math.ceil(keep * len(ranked)) :])
    return [
        dataclasses.replace(standing, ended=f"halved at step {step}") if number in losers else standing
        for number, standing in enumerate(standings)
    ]


def _stacked(step: int, states: Sequence[TrainState], standings: Sequence[Standing]) -> TrainState:
    """Returns all arrays of a checkpoint on the host, stacked over members along the first axis."""

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)

    together = {
        "now": stack([state.params for state in states]),
        "best": stack([standing.best.params for standing in standings]),
    }
    optimizer_states = stack([state.optimizer_state for state in states])
    return TrainState(np.asarray(step, np.int32), together, optimizer_states)  # type: ignore[arg-type]


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


def _restored(
    checkpoints: Checkpoints, step: int, run: TrainingRun
) -> tuple[int, list[TrainState], list[Standing], list[Any], Speed]:
    """Reads the step, the states, the standings, the states of the batches and the speed."""
    saved = checkpoints.metadata(step)
    if "standings" not in saved:
        return _restored_single(checkpoints, step, run.states[0], run.config.patience)
    everywhere = replicated(run.base.mesh)
    initial = _stacked(0, run.states, [Standing(Best(to_host(state.params))) for state in run.states])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), initial)
    stacked, data_states, _ = checkpoints.restore(step, like)
    states, standings = [], []
    for number, detail in enumerate(saved["standings"]):

        def of_member(tree: Any, number: int = number) -> Any:
            return jax.tree.map(lambda leaf: leaf[number], tree)

        own = TrainState(
            jnp.asarray(detail["steps"], jnp.int32),
            of_member(stacked.params["now"]),
            of_member(stacked.optimizer_state),
        )
        states.append(jax.device_put(own, everywhere))
        best = Best(to_host(of_member(stacked.params["best"])), detail["best_step"], detail["metrics"], detail["since"])
        score = -math.inf if detail["score"] is None else detail["score"]
        standings.append(Standing(best, detail["steps"], score, detail["ended"]))
    return int(stacked.step), states, standings, data_states, Speed(**saved.get("speed", {}))


def _restored_single(
    checkpoints: Checkpoints, step: int, like: TrainState, patience: int
) -> tuple[int, list[TrainState], list[Standing], list[Any], Speed]:
    """Reads a checkpoint of version 0.1 of a single prompt, whose best prompt is in the checkpoint of its own step."""
    state, data_state, saved = checkpoints.restore(step, like)
    best, details = Best(to_host(state.params)), saved["best"]
    if details["metrics"] is not None:
        if details["step"] not in checkpoints.steps():
            raise DamagedError(
                f"{checkpoints.directory}: the best prompt up to step {step}, of step {details['step']}, is missing"
            )
        params = checkpoints.restore(details["step"], like)[0].params
        best = Best(to_host(params), details["step"], details["metrics"], details["since"])
    done = int(state.step)
    ended = f"out of patience at step {done}" if 0 < patience <= best.since else None
    return done, [state], [Standing(best, done, best.score, ended)], [data_state], Speed(**saved.get("speed", {}))
