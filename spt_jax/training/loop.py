"""The training loop: progress, validation, checkpoints, and stopping without loss of state."""

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
from spt_jax.training.objectives import Objective, prepare_examples
from spt_jax.training.overflow import explain
from spt_jax.training.step import TrainState, init_state, make_train_step


class Stopped(Exception):  # noqa: N818 (not an error: the stop was requested)
    """Raised in all processes of a run when a signal requested a stop, after the state was saved."""

    all_processes = True

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved")
        self.exit_code = 128 + signal_number


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Training data.

    Attributes:
      examples: the examples.
      plan: the shapes of batches.
      class_weights: a weight per class; None weighs all classes equally.
    """

    examples: Sequence[Example]
    plan: BatchPlan
    class_weights: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Best:
    """The best prompt so far by validation.

    Attributes:
      params: its parameters.
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
class Rates:
    """Rates per second. Compilation, which ends with the first step, validation and saving are excluded.

    Attributes:
      examples: examples per second.
      tokens: tokens per second, without padding and the leading tokens that examples share.
      utilization: the matrix operations that steps need (`cost.step_flops`), as a share of the peak of the devices
        (`measure.peak_flops`).
    """

    examples: float = 0.0
    tokens: float = 0.0
    utilization: float = 0.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time and work of a run since its first start, as stored in its checkpoints.

    Attributes:
      seconds: the training time, without validation and saving.
      warm_seconds: the part of it after the first step of each start, without compilation.
      examples, tokens, flops: the work done in `warm_seconds`, counted as in `Rates`.
    """

    seconds: float = 0.0
    warm_seconds: float = 0.0
    examples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def rates(self, peak_flops: float) -> Rates:
        """Returns the work per second.

        Args:
          peak_flops: the peak operations per second of all devices together.
        """
        if not self.warm_seconds:
            return Rates()
        examples, tokens, flops = (work / self.warm_seconds for work in (self.examples, self.tokens, self.flops))
        return Rates(examples, tokens, flops / peak_flops)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of training: the best prompt, the steps done, their total time in seconds, and the rates."""

    best: Best
    steps: int
    train_seconds: float
    rates: Rates


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
      base: the frozen base.
      method: the method.
      optimizer: the optimizer.
      objective: the loss.
      data: the training data.
      config: options of the loop, resolved.
      workdir: the directory in which checkpoints are stored.
      log: opens the metrics log at the step from which the run starts or resumes.
      validate: returns metrics of a prompt on the validation set; if None, the last prompt counts as the best.
      save_best: called with each new best prompt.
      metadata: plain JSON that is stored in each checkpoint.
      resume: whether to resume from the newest intact checkpoint in workdir.
      resume_from: with `resume`, the step of the checkpoint to resume from instead.
      profile: the number of steps to trace into `workdir/profile`.

    Raises:
      TrainingError: a loss, gradient or prompt is not finite; the last checkpoint and the best prompt are not lost.
      CheckpointError: a checkpoint cannot be written or read.
      Stopped: after SIGTERM or SIGINT, with the state saved.
    """
    state = init_state(jax.random.key(config.seed), base, method, optimizer)
    examples = prepare_examples(objective, base, data.examples)
    stream = training_batches(
        examples, data.plan, batch_size=config.batch_size, seed=config.seed, class_weights=data.class_weights
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

        step = make_train_step(base, method, optimizer, objective, config.microbatches)
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
            # A new best prompt is always checkpointed, since a resumed run reads it from its checkpoint.
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
    """Returns the numbers of examples, tokens and operations of a batch."""
    flops = step_flops(base.config, step_shape(batch, method.prefix_length)).total
    return np.asarray([np.sum(batch.rows.examples >= 0), np.sum(batch.rows.stream.segments > 0), flops], float)


def _to_host(params: PromptParams) -> PromptParams:
    return jax.tree.map(np.asarray, params)


def _out_of_patience(config: TrainConfig, best: Best) -> bool:
    return 0 < config.patience <= best.since


def _restored(checkpoints: Checkpoints, step: int, like: TrainState) -> tuple[TrainState, Any, Best, Speed]:
    """Restores the state, the data state, the best prompt and the speed.

    The best prompt is read from the checkpoint of its step, which is kept for this purpose.
    """
    state, data_state, saved = checkpoints.restore(step, like)
    speed = Speed(**saved.get("speed", {}))  # version 0.1 saved none
    details = saved["best"]
    if details["metrics"] is None:
        return state, data_state, Best(_to_host(state.params)), speed
    if details["step"] not in checkpoints.steps():
        raise DamagedError(
            f"{checkpoints.directory}: the best prompt up to step {step}, of step {details['step']}, is missing"
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
    """Returns a progress bar over the steps of a run, of which `first` are done."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0  # fewer lines in log files
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
    """The progress bar and the clock of a run. A step's metrics are read after the next step is dispatched."""

    def __init__(self, config: TrainConfig, log: MetricsLog, first: int, before: Speed, base: FrozenBase):
        self._log, self._before, self._dtype = log, before, base.dtype
        self.peak_flops = measure.peak_flops(base.dtype) * base.mesh.size
        self._pending: tuple[int, dict[str, Any], np.ndarray] | None = None
        self._work = np.zeros(3)
        self._warm: float | None = None
        self._paused = 0.0
        self._started = time.perf_counter()
        self.bar = progress_bar(config.steps, first)

    @property
    def seconds(self) -> float:
        """Seconds since this start, without validation and saving."""
        return time.perf_counter() - self._started - self._paused

    @property
    def speed(self) -> Speed:
        """Time and work since the first start of the run."""
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
        """Registers a step whose metrics are still being computed, and reads those of the previous step."""
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
        """Excludes the time spent inside the context from the training time and the rates."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def _read(self, step: int, metrics: dict[str, Any], work: np.ndarray) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        problem = explain(step, values, self._dtype)
        if problem is not None:
            raise TrainingError(f"step {step}: {problem}. The last checkpoint and the best prompt so far are kept")
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
