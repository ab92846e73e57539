"""Optimizers and learning-rate schedules for prompts, as Optax transformations."""

import dataclasses
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from spt_jax.errors import ConfigError, did_you_mean

OptimizerName = Literal["adafactor", "adamw", "adam", "sgd", "lion"]
ScheduleName = Literal["constant", "cosine", "linear", "inverse_sqrt"]

# The options of each optimizer, with their defaults. Adafactor's are those of Lester et al. 2021.
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adafactor": {"learning_rate": 0.3, "weight_decay": 1e-5, "momentum": 0.0, "clip_norm": 0.0},
    "adamw": {"learning_rate": 0.03, "weight_decay": 0.01, "b1": 0.9, "b2": 0.999, "clip_norm": 0.0},
    "adam": {"learning_rate": 0.03, "b1": 0.9, "b2": 0.999, "clip_norm": 0.0},
    "sgd": {"learning_rate": 0.3, "weight_decay": 0.0, "momentum": 0.9, "clip_norm": 0.0},
    "lion": {"learning_rate": 0.003, "weight_decay": 0.0, "b1": 0.9, "b2": 0.99, "clip_norm": 0.0},
}
SCHEDULE_DEFAULTS: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0}

# The default optimizer, and the families with another one: options that override the tables above if that optimizer is
# used.
BASE_DEFAULTS: dict[str, Any] = {"name": "adam", "learning_rate": 0.1, "schedule": "linear"}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {"gpt2": {"name": "adam", "learning_rate": 0.03}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule. None is the default of the base's family, or else of the optimizer.

    Attributes:
      name: the optimizer.
      learning_rate: the peak learning rate of the schedule.
      schedule: cosine and linear fall to 0 at the last step; inverse_sqrt falls as 1 / sqrt(step) after the warm-up.
      warmup_steps: linear warm-up steps; 0 starts at the peak rate.
      weight_decay: adamw and lion subtract rate * decay * parameter, adafactor decay * parameter (as in T5X); sgd
        adds decay * parameter to the gradient; adam has none.
      clip_norm: the maximum global norm of the gradient; 0 disables clipping.
      momentum: the momentum of sgd and adafactor.
      b1: the decay of the first moment of adam and adamw; for lion, the weight of the momentum in the update.
      b2: the decay of the second moment of adam and adamw; for lion, the decay of the momentum.

    Raises:
      ConfigError: a value is out of range, or the named optimizer does not have the option.
    """

    name: OptimizerName | None = None
    learning_rate: float | None = None
    schedule: ScheduleName | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    momentum: float | None = None
    b1: float | None = None
    b2: float | None = None

    def __post_init__(self) -> None:
        _check_name("name", self.name, get_args(OptimizerName))
        _check_name("schedule", self.schedule, get_args(ScheduleName))
        rate: Any = self.learning_rate
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate < math.inf):
            raise ConfigError(f"optimizer.learning_rate is {rate!r}; it must be a number above 0")
        for field in ("weight_decay", "clip_norm"):
            _check_number(field, getattr(self, field), math.inf)
        for field in ("momentum", "b1", "b2"):
            _check_number(field, getattr(self, field), 1.0)
        warmup = self.warmup_steps
        if warmup is not None and (isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0):
            raise ConfigError(f"optimizer.warmup_steps is {warmup!r}; it must be an integer, 0 or more")
        for field in ("weight_decay", "momentum", "b1", "b2"):
            # 0 disables an option, so it is accepted for every optimizer.
            if self.name and getattr(self, field) and field not in OPTIMIZER_DEFAULTS[self.name]:
                having = [name for name, options in OPTIMIZER_DEFAULTS.items() if field in options]
                raise ConfigError(f"optimizer {self.name} has no {field}; {', '.join(having)} have it")


def resolve_optimizer(config: OptimizerConfig, family: str, recipe: Mapping[str, Any] | None = None) -> OptimizerConfig:
    """Fills in defaults for a base of this family (`DecoderConfig.family`).

    The family's rate and schedule apply only to the family's optimizer; other optimizers have general defaults. The
    method's `recipe` takes precedence over the family's defaults. Options that the optimizer does not have stay None.

    Args:
      config: what was set; None in a field is its default.
      family: the family of the base.
      recipe: the method's, such as `PrefixTuning.recipe`.

    Returns:
      The config with all options that its optimizer has.

    Raises:
      ConfigError: the family's optimizer does not have an option that the config sets.
    """
    family_defaults = {**FAMILY_DEFAULTS.get(family, BASE_DEFAULTS), **(recipe or {})}
    name = config.name or family_defaults["name"]
    defaults: Mapping[str, Any] = {**SCHEDULE_DEFAULTS, **OPTIMIZER_DEFAULTS[name], "name": name}
    if name == family_defaults["name"]:
        defaults = {**defaults, **family_defaults}
    return dataclasses.replace(
        config, **{field: value for field, value in defaults.items() if getattr(config, field) is None}
    )


def make_schedule(config: OptimizerConfig, steps: int, rate: float | Float[Array, ""] | None = None) -> optax.Schedule:
    """Returns a schedule that maps the number of previous updates to the learning rate.

    With w = warmup_steps, update t has the rate

        learning_rate * min(t / w, 1) * decay(t),       or learning_rate * decay(t) if w = 0

    where decay is 1 (constant); 1 - p (linear) or (1 + cos(pi p)) / 2 (cosine) for p = (t - w) / (steps - w), clipped
    to [0, 1]; or sqrt(w) / sqrt(max(t, w)) with w at least 1 (inverse_sqrt: Vaswani et al. 2017 with the warm-up,
    Raffel et al. 2020 after it).

    Args:
      config: a resolved config.
      steps: the length of the run, in updates.
      rate: a learning rate that replaces the config's; it may be traced.

    Raises:
      ConfigError: the config is not resolved, or the warm-up is longer than the run.
    """
    _check_resolved(config)
    peak, warmup = config.learning_rate or 0.0 if rate is None else rate, config.warmup_steps or 0
    if steps < 1 or warmup > steps:
        raise ConfigError(f"optimizer.warmup_steps is {warmup}, which does not fit in a run of {steps} steps")

    def schedule(count: Any) -> Float[Array, ""]:
        return jnp.asarray(_rate(jnp, config, steps, peak, jnp.asarray(count, jnp.float32)), jnp.float32)

    return schedule


def learning_rates(config: OptimizerConfig, steps: int, rate: float | None = None) -> Float[np.ndarray, " steps"]:
    """Returns the learning rate of each update of a run, computed on the host. Its arguments: see `make_schedule`."""
    peak = config.learning_rate or 0.0 if rate is None else rate
    rates = _rate(np, config, steps, peak, np.arange(steps, dtype=np.float32))
    return np.broadcast_to(np.asarray(rates, np.float32), (steps,))


def _rate(xp: ModuleType, config: OptimizerConfig, steps: int, peak: Any, step: Any) -> Any:
    """Returns the rates at float32 steps, computed with NumPy or jax.numpy (`xp`)."""
    warmup = config.warmup_steps or 0
    ramp = xp.minimum(step / warmup, 1.0) if warmup else 1.0
    progress = xp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    if config.schedule == "linear":
        decay = 1.0 - progress
    elif config.schedule == "cosine":
        decay = 0.5 * (1.0 + xp.cos(xp.pi * progress))
    elif config.schedule == "inverse_sqrt":
        decay = xp.sqrt(max(warmup, 1) / xp.maximum(step, max(warmup, 1)))
    else:
        decay = 1.0
    return peak * ramp * decay


def make_optimizer(
    config: OptimizerConfig, steps: int, rate: float | Float[Array, ""] | None = None
) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm followed by the optimizer with its schedule.

    Its `update` needs the parameters. Adafactor is configured as in Lester et al. 2021 (google-research/prompt-tuning):
    no scaling by the parameters, second-moment decay 1 - t^-0.8, updates clipped to a root mean square of 1, factored
    if both dimensions are at least 128. Adam: Kingma & Ba 2015; AdamW: Loshchilov & Hutter 2019; Lion: Chen et al.
    2023; SGD with classical momentum.

    Args:
      config: a resolved config.
      steps: the length of the run, in updates.
      rate: see `make_schedule`.

    Returns:
      The gradient transformation.

    Raises:
      ConfigError: see `make_schedule`.
    """
    schedule = make_schedule(config, steps, rate)
    # Options that the optimizer does not have are None.
    momentum, weight_decay = config.momentum or None, config.weight_decay or 0.0
    b1, b2 = config.b1 or 0.0, config.b2 or 0.0
    if config.name == "adafactor":
        optimizer = optax.adafactor(
            schedule,
            min_dim_size_to_factor=128,
            decay_rate=0.8,
            multiply_by_parameter_scale=False,
            clipping_threshold=1.0,
            momentum=momentum,
            weight_decay_rate=weight_decay or None,
        )
    elif config.name == "sgd":
        optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum))
    elif config.name == "adam":
        optimizer = optax.adam(schedule, b1, b2)
    elif config.name == "adamw":
        optimizer = optax.adamw(schedule, b1, b2, weight_decay=weight_decay)
    else:
        optimizer = optax.lion(schedule, b1, b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm else optimizer


def _check_name(field: str, value: Any, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"optimizer.{field} {value!r} is unknown; {did_you_mean(str(value), known)}")


def _check_number(field: str, value: Any, end: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < end:
        limits = "0 or more" if end == math.inf else f"at least 0 and below {end:g}"
        raise ConfigError(f"optimizer.{field} is {value!r}; it must be a number, {limits}")


def _check_resolved(config: OptimizerConfig) -> None:
    needed = {"name", *SCHEDULE_DEFAULTS, *OPTIMIZER_DEFAULTS.get(config.name or "", ())}
    missing = sorted(field for field in needed if getattr(config, field) is None)
    if missing:
        raise ConfigError(f"the optimizer config does not set {', '.join(missing)}; call resolve_optimizer first")
