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

from spt_jax import measure, processes
from spt_jax.base import FrozenBase
from spt_jax.checkpoints import Checkpoints
from spt_jax.config import TrainConfig
from spt_jax.data.batches import Batch, BatchPlan, place_batch, training_batches
from spt_jax.data.encoder import Example
from spt_jax.errors import TrainingError
from spt_jax.evaluation import selection_score
from spt_jax.prompts import Method, PromptParams
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
class Outcome:
    """What training gave: the best prompt, steps done, seconds in them, and how fast it was."""

    best: Best
    steps: int
    train_seconds: float
    rates: Rates


@contextlib.contextmanager
def graceful_stop() -> Iterator[Callable[[int], int | None]]:
    """Catches SIGTERM and SIGINT instead of dying from them; a second SIGINT interrupts at once.

    Of several processes, one that gets either stops all, as by SIGTERM.

    Yields:
      Called after every step with its number: the signal that asks to stop, or None.
    """
    caught: list[int] = []
    several = jax.process_count() > 1

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)

    def asked(step: int) -> int | None:
        if several:
            return signal.SIGTERM if processes.stop_asked(step) else None
        return caught[0] if caught else None

    # JAX has a handler of its own for SIGTERM where there are several processes.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    try:
        previous = {number: signal.signal(number, note) for number in numbers}
    except ValueError:  # not the main thread, which alone gets signals
        previous = {}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    profile: int = 0,
) -> Outcome:
    """Trains until `config.steps`, an early stop or a signal.

    Args:
      log: opens the metrics log at the step that the run starts or goes on from.
      validate: metrics of a prompt on the validation set; None keeps the last prompt as the best.
      save_best: called with every new best prompt.
      metadata: plain JSON that goes into every checkpoint.
      resume: go on from the latest checkpoint in workdir.
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
        if resume and checkpoints.latest_step() is not None:
            state, data_state, saved = checkpoints.restore(None, state)
            stream.set_state(data_state)
            best = _restored_best(checkpoints, saved["best"], state)
        first = int(state.step)
        metrics_log = stack.enter_context(contextlib.closing(log(first)))
        run = _Run(config, metrics_log, first, base)
        stack.callback(run.bar.close)
        trace = stack.enter_context(contextlib.closing(measure.Profile(workdir / "profile", profile)))

        def save(state: TrainState, best: Best) -> None:
            details = {"step": best.step, "metrics": best.metrics, "since": best.since}
            score = best.score if best.step == int(state.step) and best.metrics else None
            checkpoints.save(state, stream.get_state(), {**metadata, "best": details}, metric=score)

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
            # A new best is always checkpointed: that is where a resumed run finds it.
            if done % config.checkpoint_every == 0 or last or stop is not None or best.step == done:  # type: ignore[operator]
                run.settle()
                with run.pause():
                    save(state, best)
            if stop is not None:
                checkpoints.wait()
                raise Stopped(stop, done)
        run.settle()
        if validate is None:
            best = Best(_to_host(state.params), done)
            save_best(best)
        elif best.metrics is not None:
            save_best(best)
        checkpoints.wait()
    return Outcome(best, done, run.seconds, run.rates)


def _work(base: FrozenBase, method: Method, batch: Batch) -> np.ndarray:
    """Examples, tokens and operations of a batch."""
    flops = step_flops(base.config, step_shape(batch, method.prefix_length)).total
    return np.asarray([np.sum(batch.rows.examples >= 0), np.sum(batch.rows.stream.segments > 0), flops], float)


def _to_host(params: PromptParams) -> PromptParams:
    return jax.tree.map(np.asarray, params)


def _out_of_patience(config: TrainConfig, best: Best) -> bool:
    return 0 < config.patience <= best.since


def _restored_best(checkpoints: Checkpoints, saved: Mapping[str, Any], state: TrainState) -> Best:
    """The best prompt is that of the best checkpoint, which is kept for this."""
    if saved["metrics"] is None:
        return Best(_to_host(state.params))
    params = checkpoints.restore(saved["step"], state)[0].params
    return Best(_to_host(params), saved["step"], saved["metrics"], saved["since"])


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

    def __init__(self, config: TrainConfig, log: MetricsLog, first: int, base: FrozenBase):
        self._log, self._dtype = log, base.dtype
        self._peak_flops = measure.peak_flops(base.dtype) * base.mesh.size
        self._pending: tuple[int, dict[str, Any], np.ndarray] | None = None
        self._work = np.zeros(3)
        self._warm: float | None = None
        self._paused = 0.0
        self._begun = time.perf_counter()
        self.bar = progress_bar(config.steps, first)

    @property
    def seconds(self) -> float:
        """Seconds since the start, without validation and saving."""
        return time.perf_counter() - self._begun - self._paused

    @property
    def rates(self) -> Rates:
        """How fast the steps since the first were."""
        if self._warm is None or not self._work.any():
            return Rates()
        examples, tokens, flops = self._work / (self.seconds - self._warm)
        return Rates(float(examples), float(tokens), float(flops) / self._peak_flops)

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
        rates = self.rates
        self.bar.set_postfix(
            {
                "loss": f"{values['loss']:.3f}",
                "examples/s": f"{rates.examples:.0f}",
                "tokens/s": f"{rates.tokens:,.0f}",
                "of peak": f"{rates.utilization:.0%}",
            },
            refresh=False,
        )
