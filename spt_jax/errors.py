"""What the library raises for input that is wrong. Messages say what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class SptError(Exception):
    """Base of every error of this library."""

    exit_code = 1


class ConfigError(SptError, ValueError):
    """A configuration, or a word on the command line, is wrong."""

    exit_code = 2


class DataError(SptError, ValueError):
    """A data file, an example or a template does not fit."""


class CheckpointError(SptError, ValueError):
    """A model, prompt or training checkpoint is missing, damaged or made for something else."""


class TrainingError(SptError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class WriteError(SptError, OSError):
    """A file cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half-sentence that offers the nearest of the known names, or lists them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(known[:20]) or 'none'}{more}"


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted names of the fields in which two nested mappings differ, with both values; None where one is missing."""
    found = []
    for name in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += [(f"{name}.{field}", *values) for field, *values in differing_fields(mine, other)]
        elif mine != other:
            found.append((name, mine, other))
    return found
