"""Exceptions for invalid input. Their messages say what is wrong, where, and how to fix it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class SptError(Exception):
    """Base class of all errors of this library."""

    exit_code = 1


class ConfigError(SptError, ValueError):
    """A configuration or a command-line argument is invalid."""

    exit_code = 2


class DataError(SptError, ValueError):
    """A data file, an example or a template is invalid."""


class CheckpointError(SptError, ValueError):
    """A model, prompt or training checkpoint is missing, damaged or incompatible."""


class TrainingError(SptError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class RewardError(TrainingError):
    """Reward functions failed for too many answers."""


class WriteError(SptError, OSError):
    """A file cannot be written."""


class RemoteError(SptError, OSError):
    """A remote file or the Hugging Face hub cannot be reached, or has nothing of this name."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name closest to `name`, or None if none is close."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a hint for a message: the known name closest to `name`, or a list of known names if none is close."""
    known = sorted(known)
    near = closest(name, known)
    if near is not None:
        return f"did you mean {near!r}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(known[:20]) or 'none'}{more}"


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the fields in which two nested mappings differ: dotted name and both values, None for a missing one."""
    found = []
    for name in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += [(f"{name}.{field}", *values) for field, *values in differing_fields(mine, other)]
        elif mine != other:
            found.append((name, mine, other))
    return found
