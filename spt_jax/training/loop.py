"""The loop around the step: progress, validation, checkpoints, and stopping without losing anything."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, BatchPlan, place_batch, training_batches
from spt_jax.data.examples import Example
from spt_jax.errors import TrainingError
from spt_jax.evaluation.evaluate import selection_score
from spt_jax.prompts import Method, PromptParams
from spt_jax.runtime import measure, processes, signals
from spt_jax.training.checkpoints import Checkpoints, DamagedError
from spt_jax.training.config import TrainConfig
from spt_jax.training.cost import step_flops, step_shape
from spt_jax.training.logs import MetricsLog
from spt_jax.training.overflow import explain
from spt_jax.training.step import Objective, TrainState, init_state, make_train_step


class Stopped(Exception):  # noqa: N818 (no error: somebody asked)
    """A signal asked the run to stop, and its state is saved; raised in all processes of a run alike."""

    all_processes = True

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved")
        self.exit_code = 128 + signal_number


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples, how they are batched, and a weight per class if classes weigh differently."""

    examples: Sequence[Example]
    plan: BatchPlan
    class_weights: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Best:
    """The best prompt so far by validation, and how many validations have passed since."""

    params: PromptParams
    step: int = 0
    metrics: Mapping[str, Any] | None = None
    since: int = 0

    @property
    def score(self) -> float:
        return -math.inf if self.metrics is None else selection_score(self.metrics)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Per second, since the first step came back, which is when the program was compiled; without validation.

    tokens: those of examples, without padding and the leading ones that examples share.
    utilization: matrix products that a step needs (`cost.step_flops`), of what the devices can do
      (`measure.peak_flops`).
    """

    examples: float = 0.0
    tokens: float = 0.0
    utilization: float = 0.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """The time that a run has taken and what it did in it, since its very start, as its checkpoints keep it.

    seconds: in training, without validation and saving.
    warm_seconds: those of them since the first step of each start came back, which is when the program was compiled.
    examples, tokens, flops: done in the latter, as of `Rates`.
    """

    seconds: float = 0.0
    warm_seconds: float = 0.0
    examples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def rates(self, peak_flops: float) -> Rates:
        """Per second; peak_flops: operations per second of all devices at most."""
        if not self.warm_seconds:
            return Rates()
        examples, tokens, flops = (own / self.warm_seconds for own in (self.examples, self.tokens, self.flops))
        return Rates(examples, tokens, flops / peak_flops)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training gave: the best prompt, steps done, seconds in them, and how fast it was."""

    best: Best
    steps: int
    train_seconds: float
    rates: Rates


@contextlib.contextmanager
def graceful_stop() -> Iterator[Callable[[int], int | None]]:
    """Catches SIGTERM and SIGINT instead of ending at once; SIGINT after another signal does end the process at once.

    Of several processes, one that gets either stops all, as by SIGTERM.

    Yields:
      Called after every step with its number, and after the last with the next: the signal that asks to stop, or None.
    """
    several = jax.process_count() > 1
    # JAX has a handler of its own for SIGTERM where there are several processes.
    numbers = (signal.SIGINT,) if several else signals.NUMBERS
    with signals.held(numbers, lambda: signal.raise_signal(signal.SIGTERM) if several else None) as caught:

        def asked(step: int) -> int | None:
            if several:
                return signal.SIGTERM if processes.stop_asked(step) else None
            return caught[0] if caught else None

        yield asked


def fit(
    base: FrozenBase,
    method: Method,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    *,
    workdir: Path,
    log: Callable[[int], MetricsLog],
    validate: Callable[[PromptParams], Mapping[str, Any]] | None,
    save_best: Callable[[Best], None],
    metadata: Mapping[str, Any],
    resume: bool = False,
    resume_from: int | None = None,
    profile: int = 0,
) -> Outcome:
    """Trains until `config.steps`, an early stop or a signal.

    Args:
      log: opens the metrics log at the step that the run starts or goes on from.
      validate: metrics of a prompt on the validation set; None keeps the last prompt as the best.
      save_best: called with every new best prompt.
      metadata: plain JSON that goes into every checkpoint.
      resume: go on from the newest checkpoint in workdir that is intact.
      resume_from: with resume, go on from the checkpoint of this step instead.
      profile: steps to trace into workdir's profile/.

    Raises:
      TrainingError: a loss, gradient or prompt is not finite; the last checkpoint and the best prompt are kept.
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    state = init_state(jax.random.key(config.seed), base, method, optimizer)
    stream = training_batches(
        data.examples, data.plan, batch_size=config.batch_size, seed=config.seed, class_weights=data.class_weights
    )
    best = Best(_to_host(state.params))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.keep))
        asked_to_stop = stack.enter_context(graceful_stop())
        speed = Speed()
        if resume:
            start = state
            found = checkpoints.restore_intact(resume_from, lambda step: _restored(checkpoints, step, start))
            if found is not None:
                state, data_state, best, speed = found
                stream.set_state(data_state)
        checkpoints.remove_cut_off_saves()
        first = int(state.step)
        metrics_log = stack.enter_context(contextlib.closing(log(first)))
        run = _Run(config, metrics_log, first, speed, base)
        stack.callback(run.bar.close)
        trace = stack.enter_context(contextlib.closing(measure.Profile(workdir / "profile", profile)))

        def save(state: TrainState, best: Best) -> Speed:
            speed = run.speed
            details = {"step": best.step, "metrics": best.metrics, "since": best.since}
            score = best.score if best.step == int(state.step) and best.metrics else None
            with run.pause():
                metrics_log.sync()
                saved = {**metadata, "best": details, "speed": dataclasses.asdict(speed)}
                checkpoints.save(state, stream.get_state(), saved, metric=score)
            return speed

        step = make_train_step(base, method, optimizer, objective)
        if first == 0:
            save(state, best)
        done = first
        while done < config.steps and not _out_of_patience(config, best):
            trace.before_step(done - first, run.settle)
            batch = next(stream)
            state, metrics = step(state, place_batch(batch, base.mesh))
            done += 1
            run.dispatched(done, metrics, _work(base, method, batch))
            last, stop = done == config.steps, asked_to_stop(done)
            if validate is not None and (done % config.evaluate_every == 0 or last):  # type: ignore[operator]
                run.settle()
                with run.pause():
                    best = _validated(best, _to_host(state.params), done, validate, metrics_log, save_best)
            ended = last or stop is not None or _out_of_patience(config, best)
            # A new best is always checkpointed: that is where a resumed run finds it.
            if done % config.checkpoint_every == 0 or ended or best.step == done:  # type: ignore[operator]
                run.settle()
                speed = save(state, best)
            if stop is not None:
                checkpoints.wait()
                raise Stopped(stop, done)
        if validate is None:
            best = Best(_to_host(state.params), done)
            save_best(best)
        elif best.metrics is not None:
            save_best(best)
        checkpoints.wait()
    stop = asked_to_stop(done + 1)  # during the last validation or save, or while the logs were closed
    if stop is not None:
        raise Stopped(stop, done)
    return Outcome(best, done, speed.seconds, speed.rates(run.peak_flops))


def _work(base: FrozenBase, method: Method, batch: Batch) -> np.ndarray:
    """Examples, tokens and operations of a batch."""
    flops = step_flops(base.config, step_shape(batch, method.prefix_length)).total
    return np.asarray([np.sum(batch.rows.examples >= 0), np.sum(batch.rows.stream.segments > 0), flops], float)


def _to_host(params: PromptParams) -> PromptParams:
    return jax.tree.map(np.asarray, params)


def _out_of_patience(config: TrainConfig, best: Best) -> bool:
    return 0 < config.patience <= best.since


def _restored(checkpoints: Checkpoints, step: int, like: TrainState) -> tuple[TrainState, Any, Best, Speed]:
    """State, place in the data, best prompt and speed; the best is that of the best checkpoint, kept for this."""
    state, data_state, saved = checkpoints.restore(step, like)
    speed = Speed(**saved.get("speed", {}))  # version 0.1 saved none
    details = saved["best"]
    if details["metrics"] is None:
        return state, data_state, Best(_to_host(state.params)), speed
    if details["step"] not in checkpoints.steps():
        raise DamagedError(
            f"{checkpoints.directory}: the best prompt up to step {step}, of step {details['step']}, is gone"
        )
    params = checkpoints.restore(details["step"], like)[0].params
    return state, data_state, Best(_to_host(params), details["step"], details["metrics"], details["since"]), speed


def _validated(
    best: Best,
    params: PromptParams,
    step: int,
    validate: Callable[[PromptParams], Mapping[str, Any]],
    log: MetricsLog,
    save_best: Callable[[Best], None],
) -> Best:
    metrics = validate(params)
    log.write(step, {"validation": dict(metrics)})
    if selection_score(metrics) <= best.score:
        return dataclasses.replace(best, since=best.since + 1)
    best = Best(params, step, metrics)
    save_best(best)
    return best


def progress_bar(steps: int, first: int) -> tqdm:
    """Of the steps of a run, some of which are done."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    return tqdm(
        total=steps,
        initial=first,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        mininterval=seconds,
        disable=not processes.leads(),
    )


class _Run:
    """Progress bar and clock of a run. A step's metrics are read after the next step is dispatched."""

    def __init__(self, config: TrainConfig, log: MetricsLog, first: int, before: Speed, base: FrozenBase):
        self._log, self._before, self._dtype = log, before, base.dtype
        self.peak_flops = measure.peak_flops(base.dtype) * base.mesh.size
        self._pending: tuple[int, dict[str, Any], np.ndarray] | None = None
        self._work = np.zeros(3)
        self._warm: float | None = None
        self._paused = 0.0
        self._begun = time.perf_counter()
        self.bar = progress_bar(config.steps, first)

    @property
    def seconds(self) -> float:
        """Seconds since this start, without validation and saving."""
        return time.perf_counter() - self._begun - self._paused

    @property
    def speed(self) -> Speed:
        """Since the run's very start."""
        seconds, before = self.seconds, self._before
        if self._warm is None or not self._work.any():
            return dataclasses.replace(before, seconds=before.seconds + seconds)
        examples, tokens, flops = map(float, self._work)
        return Speed(
            before.seconds + seconds,
            before.warm_seconds + seconds - self._warm,
            before.examples + examples,
            before.tokens + tokens,
            before.flops + flops,
        )

    def dispatched(self, step: int, metrics: dict[str, Any], work: np.ndarray) -> None:
        """Takes a step's metrics, still being computed, and reads those of the step before."""
        previous, self._pending = self._pending, (step, metrics, work)
        if previous is not None:
            self._read(*previous)

    def settle(self) -> None:
        """Waits for the last step and reads its metrics."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside counts neither as training nor for the rate."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun

    def _read(self, step: int, metrics: dict[str, Any], work: np.ndarray) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        broken = explain(step, values, self._dtype)
        if broken is not None:
            raise TrainingError(f"step {step}: {broken}. The last checkpoint and the best prompt so far are kept")
        if self._warm is None:
            self._warm = self.seconds
        else:
            self._work += work
        self._log.write(step, values)
        self.bar.update(1)
        rates = self.speed.rates(self.peak_flops)
        self.bar.set_postfix(
            {
                "loss": f"{values['loss']:.3f}",
                "examples/s": f"{rates.examples:.0f}",
                "tokens/s": f"{rates.tokens:,.0f}",
                "of peak": f"{rates.utilization:.0%}",
            },
            refresh=False,
        )
