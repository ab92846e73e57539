"""What `fit` returns."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from spt_jax.api.prompt import Prompt
from spt_jax.errors import ConfigError
from spt_jax.experiment.run import Artifact, Experiment
from spt_jax.prompts.storage import INFO_FILE, prompt_files
from spt_jax.runtime.sharding import replicated
from spt_jax.training.clock import Rates
from spt_jax.training.loop import Best


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult:
    """The result of `fit`.

    Attributes:
      prompts: the best prompt by validation, or the last one without validation records, under the name ""; for
        `MultitaskPromptTuning`, the prompt of each task and the shared one, as they would be saved.
      steps: the number of steps done.
      best_step: the step of the best prompt.
      validation: the validation metrics of the best prompt; None without validation records.
      history: a mapping with "step" for each step, with its metrics, and for each validation, with "validation".
      train_seconds: the training time in seconds, without validation.
      rates: examples and tokens per second.
      trainable_parameters: the number of trained parameters.
    """

    prompts: Mapping[str, Prompt]
    steps: int
    best_step: int
    validation: Mapping[str, Any] | None
    history: Sequence[Mapping[str, Any]]
    train_seconds: float
    rates: Rates
    trainable_parameters: int

    @property
    def prompt(self) -> Prompt:
        """The prompt.

        Raises:
          ConfigError: there is one for each task.
        """
        if len(self.prompts) > 1:
            raise ConfigError(f"there are several prompts; take one from `prompts`: {', '.join(self.prompts)}")
        return next(iter(self.prompts.values()))

    def __repr__(self) -> str:
        shown = ("accuracy", "exact_match", "loss")
        metrics = [f"{name}={self.validation[name]:.4g}" for name in shown if name in (self.validation or {})]  # type: ignore[index]
        prompts = f"prompts={list(self.prompts)}" if len(self.prompts) > 1 else f"prompt={self.prompt!r}"
        return f"FitResult({', '.join([f'steps={self.steps}', f'best_step={self.best_step}', *metrics, prompts])})"


def stored_with(best: Best) -> dict[str, Any]:
    """Returns what is stored with a prompt."""
    return {"step": best.step, "validation": best.metrics}


def prompts_of(experiment: Experiment, best: Best, progress: bool) -> dict[str, Prompt]:
    """Returns the prompts of the method's parameters, as they would be saved and loaded."""
    base = experiment.base

    def loaded(name: str, own: Artifact) -> Prompt:
        files = prompt_files(Path(name), base, own.method, own.virtual, own.template, extra=own.extra)
        virtual = jax.device_put(own.virtual, replicated(base.mesh))
        return Prompt(own.method, virtual, own.template, json.loads(files[INFO_FILE]), base, progress)

    return {name: loaded(name, own) for name, own in experiment.artifacts(best.params, stored_with(best)).items()}
