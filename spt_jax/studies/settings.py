"""The settings that a sweep tries: config fields with values to combine or ranges to draw from."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.prompts import METHODS
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import OBJECTIVES

Settings = dict[str, str]  # values by dotted field name, as written on a command line
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<log>:log)?")


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of numbers to draw from, ends included.

    Attributes:
      low: the lower end.
      high: the upper end.
      whole: draw integers; set if both ends are integers.
      log: draw uniformly in the logarithm.
    """

    low: float
    high: float
    whole: bool
    log: bool

    def draw(self, rng: np.random.Generator) -> str:
        if self.whole and not self.log:
            return str(rng.integers(int(self.low), int(self.high) + 1))
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(*ends)
        value = math.exp(value) if self.log else value
        return str(round(value)) if self.whole else f"{value:.4g}"


def parse_field(text: str, config: ExperimentConfig[Any]) -> tuple[str, list[str] | Range]:
    """Parses FIELD=VALUE,VALUE (`\\,` is a comma in a value), FIELD=LOW..HIGH or FIELD=LOW..HIGH:log.

    If a field takes several words, they are separated by spaces in a value.

    Raises:
      ConfigError: the text has another form, there is no such field, a range is empty, or a value occurs twice.
    """
    name, equals, written = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not equals or not written:
        raise ConfigError(f"--over {text!r} is neither FIELD=VALUE,VALUE,... nor FIELD=LOW..HIGH")
    known = config_fields(config)
    if name not in known:
        raise ConfigError(f"--over: no field {name!r}; {did_you_mean(name, known)}")
    found = _RANGE.fullmatch(written)
    if found is None:
        values = [value.replace("\\,", ",") for value in re.split(r"(?<!\\),", written)]
        if len(set(values)) < len(values) or "" in values:
            raise ConfigError(f"--over {text!r}: a value is empty or occurs twice")
        return name, values
    low, high = found["low"], found["high"]
    if float(low) >= float(high) or (found["log"] and float(low) <= 0):
        raise ConfigError(f"--over {text!r}: LOW must be less than HIGH, and with :log greater than 0")
    whole = all(re.fullmatch(r"[-+]?\d+", end) for end in (low, high))
    return name, Range(float(low), float(high), whole, bool(found["log"]))


def config_fields(config: ExperimentConfig[Any]) -> dict[str, Any]:
    """Returns a config's fields by dotted name, including those of all other methods and objectives, with defaults."""
    found: dict[str, Any] = {}
    for method in METHODS.values():
        found |= _fields(method(), "method.")
    for over in OBJECTIVES:
        found |= _fields(LossConfig().with_options(over), "loss.")
    return found | _fields(config)


def _fields(part: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        found |= _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def flag_words(name: str, value: str, config: ExperimentConfig[Any]) -> list[str]:
    """Returns the command-line words that set a field.

    Raises:
      ConfigError: the value of a boolean field is neither True nor False.
    """
    group, _, field = name.replace("_", "-").rpartition(".")
    default = config_fields(config)[name]
    if isinstance(default, bool):
        if value not in ("True", "False"):
            raise ConfigError(f"--over {name}={value}: the value must be True or False")
        return [f"--{group}.{'' if value == 'True' else 'no-'}{field}"]
    several = isinstance(default, (tuple, Mapping))
    return [f"--{group}.{field}", *(value.split() if several else [value])]


def check_method(setting: Settings, argv: Sequence[str]) -> None:
    """Checks that a method that is swept over has the options of methods that are given for all trials.

    Args:
      setting: the values of one trial.
      argv: the words of the command line.

    Raises:
      ConfigError: it lacks one; the message names both.
    """
    kind = METHODS.get(setting.get("method.name", ""))
    if kind is None:
        return
    known = {"name", *(field.name for field in dataclasses.fields(kind))}
    given = [*(f"--{name}" for name in setting), *(word.partition("=")[0] for word in argv)]
    for option in given:
        group, _, name = option.replace("-", "_").partition(".")
        if group == "__method" and not known & {own := name.partition(".")[0], own.removeprefix("no_")}:
            raise ConfigError(f"--over method.name={setting['method.name']}: this method has no option {option}")


def settings(fields: Sequence[tuple[str, list[str] | Range]], trials: int | None, seed: int) -> list[Settings]:
    """Returns all combinations of the fields' values, or `trials` different random settings.

    Raises:
      ConfigError: a field occurs twice, there is a range but no number of trials, or there are fewer different settings
        than trials.
    """
    names = [name for name, _ in fields]
    if len(set(names)) < len(names):
        raise ConfigError(f"--over names {max(names, key=names.count)} twice")
    if trials is None:
        values: list[list[str]] = []
        for name, of_field in fields:
            if isinstance(of_field, Range):
                raise ConfigError(f"--over {name} is a range; give the number of settings to draw with --trials")
            values.append(of_field)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    if trials < 1 or not fields:
        raise ConfigError(
            f"--trials is {trials}; it must be at least 1, the number of settings to draw, and needs fields in --over"
        )
    rng = np.random.default_rng(seed)
    drawn: list[Settings] = []
    for _ in range(100 * trials):
        one = {name: of.draw(rng) if isinstance(of, Range) else str(rng.choice(of)) for name, of in fields}
        if one not in drawn:
            drawn.append(one)
        if len(drawn) == trials:
            return drawn
    raise ConfigError(f"--over does not have {trials} different settings to draw, only {len(drawn)}")


def named(chosen: Settings) -> str:
    """Returns a setting as text."""
    return ", ".join(f"{name} {value}" for name, value in chosen.items()) or "the config as it is"
