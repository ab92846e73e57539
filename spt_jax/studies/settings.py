"""Which settings a sweep tries: fields of a config, with values to combine or ranges to draw from."""

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

Settings = dict[str, str]  # values by the dotted names of fields, as a command line has them
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<log>:log)?")


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two ends, which belong to it: whole ones where both ends are; log: uniform in the logarithm."""

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
    """Reads FIELD=VALUE,VALUE (`\\,` is a comma in a value), FIELD=LOW..HIGH or FIELD=LOW..HIGH:log.

    A value of a field that takes several words has spaces between them.

    Raises:
      ConfigError: it reads otherwise, there is no such field, a range is empty, or a value comes twice.
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
            raise ConfigError(f"--over {text!r}: a value is empty or comes twice")
        return name, values
    low, high = found["low"], found["high"]
    if float(low) >= float(high) or (found["log"] and float(low) <= 0):
        raise ConfigError(f"--over {text!r}: a range goes up, and with :log it begins above 0")
    whole = all(re.fullmatch(r"[-+]?\d+", end) for end in (low, high))
    return name, Range(float(low), float(high), whole, bool(found["log"]))


def config_fields(config: ExperimentConfig[Any]) -> dict[str, Any]:
    """A config's fields by their dotted names, and those of every other method with their defaults."""
    found: dict[str, Any] = {}
    for method in METHODS.values():
        found |= _fields(dataclasses.replace(config, method=method()))
    return found | _fields(config)


def _fields(part: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        found |= _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def flag_words(name: str, value: str, config: ExperimentConfig[Any]) -> list[str]:
    """A field and its value as a command line has them.

    Raises:
      ConfigError: a switch that is neither True nor False.
    """
    group, _, field = name.replace("_", "-").rpartition(".")
    default = config_fields(config)[name]
    if isinstance(default, bool):
        if value not in ("True", "False"):
            raise ConfigError(f"--over {name}={value}: it is True or False")
        return [f"--{group}.{'' if value == 'True' else 'no-'}{field}"]
    several = isinstance(default, (tuple, Mapping))
    return [f"--{group}.{field}", *(value.split() if several else [value])]


def settings(fields: Sequence[tuple[str, list[str] | Range]], trials: int | None, seed: int) -> list[Settings]:
    """All combinations of the fields' values, or so many different draws of each.

    Raises:
      ConfigError: a field twice, a range without a number of trials, or fewer different settings than trials.
    """
    names = [name for name, _ in fields]
    if len(set(names)) < len(names):
        raise ConfigError(f"--over names {max(names, key=names.count)} twice")
    if trials is None:
        values: list[list[str]] = []
        for name, of_field in fields:
            if isinstance(of_field, Range):
                raise ConfigError(f"--over {name} is a range to draw from; say how many settings to draw with --trials")
            values.append(of_field)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
    if trials < 1 or not fields:
        raise ConfigError(f"--trials is {trials}; it is how many settings to draw, at least 1, of fields in --over")
    rng = np.random.default_rng(seed)
    drawn: list[Settings] = []
    for _ in range(100 * trials):
        one = {name: of.draw(rng) if isinstance(of, Range) else str(rng.choice(of)) for name, of in fields}
        if one not in drawn:
            drawn.append(one)
        if len(drawn) == trials:
            return drawn
    raise ConfigError(f"--over has no {trials} different settings to draw; it gave {len(drawn)}")


def named(chosen: Settings) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value}" for name, value in chosen.items()) or "the config as it is"
