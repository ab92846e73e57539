"""Trains a prompt on records in memory, as `spt-jax train` does on files."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from spt_jax.api.prompt import Prompt
from spt_jax.api.result import FitResult, prompts_of, stored_with
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.records import RecordSource, gather_records
from spt_jax.data.templates import TEXT, Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import EvaluationConfig, EvaluationSet
from spt_jax.evaluation.rewards import RewardFunction, reward_text
from spt_jax.experiment.config import BaseConfig, DataConfig, ExperimentConfig, TaskConfig, resolve
from spt_jax.experiment.run import Experiment, Records, input_digests, load_experiment
from spt_jax.experiment.self_study import STUDY_FILE, write_study
from spt_jax.experiment.training import Prepared, claimed, prepare, tune
from spt_jax.experiment.workdir import check_workdir, input_paths
from spt_jax.interop import peft_note
from spt_jax.prompts import Method
from spt_jax.runtime import processes
from spt_jax.runtime.mirror import check_shared, staged
from spt_jax.runtime.waits import silent, spoken
from spt_jax.training.config import LogConfig, TrainConfig, given
from spt_jax.training.logs import MetricsLog, NoLog, read_metrics
from spt_jax.training.loop import Best, Events, Stopped
from spt_jax.training.objectives import Distillation, Objective
from spt_jax.training.optimizers import OptimizerConfig


class Callback:
    """Base class of the callbacks of `fit`. Its methods do nothing."""

    def trained(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each step.

        Args:
          step: the number of steps done, from 1.
          metrics: the metrics of the step, such as "loss".
        """

    def validated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called after each validation.

        Args:
          step: the number of steps done.
          metrics: the validation metrics, such as "loss" and "accuracy".
        """

    def improved(self, step: int, prompt: Prompt) -> None:
        """Called with each new best prompt; with several tasks, with the prompt of each.

        Args:
          step: the number of steps done.
          prompt: the prompt.
        """

    def ends(self) -> bool:
        """Returns whether to end training with the current step, which is then validated as the last one.

        It is asked once per step, when `trained` was called for the previous one, and after a validation.
        """
        return False


def fit(
    base: FrozenBase | str | Path,
    method: Method,
    template: Template,
    train: RecordSource,
    *,
    validation: RecordSource | None = None,
    steps: int = 1000,
    batch_size: int = 32,
    microbatches: int = 1,
    learning_rate: float | None = None,
    optimizer: OptimizerConfig | optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    rewards: Sequence[str | RewardFunction] = (),
    class_weights: Sequence[float] = (),
    evaluate_every: int | None = None,
    patience: int = 0,
    seed: int = 0,
    max_length: int | None = None,
    packing: bool = True,
    evaluation: EvaluationConfig | None = None,
    callbacks: Sequence[Callback] = (),
    workdir: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> FitResult:
    """Trains a prompt. It is bit for bit the prompt of `spt-jax train` with the same records and options.

    Records are a list of mappings from field names to values; a data frame of pandas or Polars; a `datasets.Dataset`;
    or the name of a file or of a hub data set. Of a stream, such as an `IterableDataset`, as many records are read as
    all steps together could use, `steps * batch_size`, and kept in memory.

    Args:
      base: the frozen base, or what `load_base` takes.
      method: the method. A length that is not set follows from the template.
      template: the template. `virtual_tokens` may be left out. Without verbalizers, a task with classes takes them from
        the training records. `head` names the task, if it is not the one of the method.
      train: the training records; none are needed beside the questions of `Distillation(study=...)`.
      validation: the records that choose the best prompt; without them, the last prompt is taken.
      steps: optimizer steps.
      batch_size: examples per step.
      microbatches: the number of parts that a batch is split into, which saves memory and has the same result.
      learning_rate: the peak learning rate; None for the default of method and base.
      optimizer: the optimizer's options, or an Optax transformation, which then includes the learning rate.
      objective: the objective, registered or not; None for the default of the task.
      rewards: for a template of the task "rewards", the functions that judge answers, each from the top of a module;
        or names, as in `TaskConfig.reward`.
      class_weights: a weight per class, in the order of the verbalizers; empty weighs all equally.
      evaluate_every: steps between validations; default a tenth of the run.
      patience: stop after this many validations without improvement; 0 never stops early.
      seed: the random seed of initialization and data order.
      max_length: the maximum number of tokens of an example; default the base's positions.
      packing: whether several examples share a row.
      evaluation: how the validation is run.
      callbacks: told about the progress, in this order.
      workdir: a directory or URL for checkpoints, metrics and the best prompt, from which the run can be resumed; by
        default, nothing is written.
      checkpoint_every: steps between checkpoints; default `evaluate_every`.
      resume: resume the run in `workdir`. An Optax transformation and callbacks must be the same as before.
      overwrite: delete the run in `workdir` and start over.
      progress: whether to show a progress bar and messages, on stderr.

    Returns:
      The best prompt by validation, or one for each task, and the metrics of the run.

    Raises:
      ConfigError: arguments are invalid or incompatible; names such as train.steps or data.prompt in its message are
        those of the command line's options.
      DataError: records are of another type, there are none, or one lacks a field, has an unknown class or is too long.
      CheckpointError: the base cannot be read, or a checkpoint cannot be written or read.
      TrainingError: a loss, gradient or prompt is not finite, or the device ran out of memory.
      Stopped: with `workdir`, after SIGTERM or SIGINT, with the state saved. Without it, SIGINT raises
        KeyboardInterrupt after the current step.
    """
    if workdir is None and (resume or overwrite or checkpoint_every is not None):
        raise ConfigError("resume, overwrite and checkpoint_every need a workdir")
    options = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        microbatches=microbatches,
        seed=seed,
        evaluate_every=evaluate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
    )
    transformation, recipe = _optimizer(optimizer, learning_rate)
    sources = {"train": train} if validation is None else {"train": train, "validation": validation}
    names = {split: _name(source, split) for split, source in sources.items()}
    limits = {"train": steps * batch_size}
    studied = {"train"} if isinstance(objective, Distillation) and objective.study else set()
    records: dict[str, Records] = {
        split: gather_records(source, names[split], limit=limits.get(split), may_be_empty=split in studied)
        for split, source in sources.items()
    }
    if not isinstance(base, FrozenBase):
        with spoken(f"loading {base}", shown=progress):
            base, remat = load_base(base, max_length=max_length), "auto"
    else:
        remat = "auto" if base.family == "flax" else base.remat
    method = _with_tasks(method, template)
    config = resolve(
        ExperimentConfig(
            base=BaseConfig(path=base.name, revision=base.revision, remat=remat),
            data=_data(template, names, max_length=max_length, packing=packing),
            method=method,
            task=TaskConfig(
                name=None if template.head == TEXT else template.head, reward=tuple(map(reward_text, rewards))
            ),
            optimizer=recipe,
            loss=given(objective, tuple(class_weights)),
            train=options,
            evaluation=evaluation or EvaluationConfig(),
        )
    )
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(silent())
        folder, reads = None, input_paths(config)
        if workdir is not None:
            folder = Path(workdir).expanduser()
            check_shared(folder, jax.process_count() > 1)
            folder = stack.enter_context(staged(folder))
        if folder is not None and processes.leads():
            check_workdir(folder, resume=resume, overwrite=overwrite, reads=reads)
        with spoken(f"encoding {len(records['train']):,} records", shown=progress):
            written = folder / STUDY_FILE if folder is not None and resume else None
            experiment = load_experiment(config, base, records, written)
            tuned = experiment.config.method
            if template.virtual_tokens not in (0, tuned.token_count):
                raise ConfigError(
                    f"template.virtual_tokens is {template.virtual_tokens}, but {tuned!r} has {tuned.token_count};"
                    " leave it out"
                )
            new_tokens = experiment.template.new_tokens
            if template.new_tokens not in ((), new_tokens):
                raise ConfigError(
                    f"template.new_tokens is {template.new_tokens}, but the method has {new_tokens}; leave it out"
                )
            prepared = prepare(experiment, transformation)
            asked = None
            if experiment.validation is not None:
                asked = prepared.experiment.evaluation_set(experiment.validation, experiment.template)
        if progress and processes.leads():
            notes = experiment.window_note(prepared.examples), peft_note(experiment.base, tuned, experiment.template)
            print("\n".join(note for note in notes if note is not None), file=sys.stderr)
        events = _Callbacks(prepared.experiment, callbacks, progress)
        if folder is not None:
            encoded = {"train": prepared.examples, **({} if asked is None else {"validation": asked.examples})}
            inputs = input_digests([(prepared.experiment, encoded)])
            stack.enter_context(claimed(folder, prepared, inputs, resume=resume, overwrite=overwrite, reads=reads))
            if experiment.study is not None and processes.leads():
                write_study(folder / STUDY_FILE, experiment.study)
        return _run(prepared, asked, folder, events, resume=resume, progress=progress)


def _run(
    prepared: Prepared,
    validation: EvaluationSet | None,
    workdir: Path | None,
    events: "_Callbacks",
    *,
    resume: bool,
    progress: bool,
) -> FitResult:
    """Trains, and returns the best prompt and the metrics."""
    experiment = prepared.experiment

    def save_best(best: Best) -> None:
        if workdir is not None:
            experiment.save(workdir / "prompt", best.params, stored_with(best))

    def open_log(step: int) -> MetricsLog:
        if workdir is None or not processes.leads():
            return NoLog()
        return MetricsLog(workdir, LogConfig(), from_step=step, run_config=prepared.settings)

    try:
        outcome = tune(
            prepared,
            validation,
            workdir=workdir,
            log=open_log,
            save_best=save_best,
            resume=resume,
            events=events,
            progress=progress,
        )
    except Stopped as stopped:
        if workdir is None:  # nothing is saved, so the signal has its usual effect
            signal.raise_signal(stopped.signal_number)
        raise
    best = outcome.best
    return FitResult(
        prompts=prompts_of(experiment, best, progress),
        steps=outcome.steps,
        best_step=best.step,
        validation=best.metrics,
        history=events.history if workdir is None else read_metrics(workdir / "metrics.jsonl"),
        train_seconds=outcome.train_seconds,
        rates=outcome.rates,
        trainable_parameters=experiment.config.method.trainable_count(best.params),
    )


def _name(source: RecordSource, split: str) -> str:
    """Returns the name of a source in error messages: that of the file or, for records in memory, of the argument."""
    return str(source) if isinstance(source, str | Path) else split


def _data(template: Template, names: Mapping[str, str], *, max_length: int | None, packing: bool) -> DataConfig:
    """Returns the config of the data, in which the template's strings and the names of the sources are fields."""
    return DataConfig(
        train=names["train"],
        validation=names.get("validation"),
        prompt=template.prompt,
        target=template.target,
        rejected=template.rejected,
        verbalizers=template.verbalizers,
        reads=template.reads,
        task=template.task,
        truncate=template.truncate,
        keep=template.keep,
        max_length=max_length,
        chat=template.chat,
        system=template.system,
        continues=template.continues,
        packing=packing,
    )


def _optimizer(
    optimizer: OptimizerConfig | optax.GradientTransformation | None, learning_rate: float | None
) -> tuple[optax.GradientTransformation | None, OptimizerConfig]:
    """Returns the transformation, if one is given, and the options to build one from otherwise."""
    if optimizer is None or isinstance(optimizer, OptimizerConfig):
        config = optimizer or OptimizerConfig()
        if learning_rate is not None and config.learning_rate not in (None, learning_rate):
            raise ConfigError(f"learning_rate is {learning_rate}, and that of optimizer is {config.learning_rate}")
        rate = config.learning_rate if learning_rate is None else learning_rate
        return None, dataclasses.replace(config, learning_rate=rate)
    if learning_rate is not None:
        raise ConfigError("an Optax transformation includes its learning rate: leave learning_rate out")
    return optimizer, OptimizerConfig()


def _with_tasks(method: Method, template: Template) -> Method:
    """Returns the method with the tasks that the template names."""
    tasks = getattr(method, "tasks", None)
    if not template.tasks or tasks is None or tasks == template.tasks:
        return method
    if tasks:
        raise ConfigError(
            f"the tasks of method and template differ: {', '.join(tasks)} and {', '.join(template.tasks)}"
        )
    return dataclasses.replace(method, tasks=template.tasks)


class _Callbacks(Events):
    """Tells the callbacks what happens, and keeps the history."""

    def __init__(self, experiment: Experiment, callbacks: Sequence[Callback], progress: bool):
        self.history: list[dict[str, Any]] = []
        self._experiment, self._callbacks, self._progress = experiment, callbacks, progress
        self._told: int | None = None

    def trained(self, log: MetricsLog, step: int, values: Mapping[int, Mapping[str, float]]) -> None:
        self.history.append({"step": step, **values[0]})
        for callback in self._callbacks:
            callback.trained(step, values[0])

    def validated(self, log: MetricsLog, step: int, member: int, metrics: Mapping[str, Any]) -> None:
        self.history.append({"step": step, "validation": dict(metrics)})
        for callback in self._callbacks:
            callback.validated(step, metrics)

    def improved(self, member: int, best: Best) -> None:
        if not self._callbacks or best.step == self._told:  # the loop repeats the last one
            return
        self._told = best.step
        for prompt in prompts_of(self._experiment, best, self._progress).values():
            for callback in self._callbacks:
                callback.improved(best.step, prompt)

    def ends(self) -> bool:
        return any(callback.ends() for callback in self._callbacks)
