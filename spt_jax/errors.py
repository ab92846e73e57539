"""What the library raises for input that is wrong. Messages say what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class SptError(Exception):
    """Base of every error of this library."""


class ConfigError(SptError, ValueError):
    """A configuration, or a word on the command line, is wrong (exit code 2)."""


class DataError(SptError, ValueError):
    """A data file, an example or a template does not fit (exit code 1)."""


class CheckpointError(SptError, ValueError):
    """A model, prompt or training checkpoint is missing, damaged or made for something else (exit code 1)."""


class TrainingError(SptError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite (exit code 1)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half-sentence that offers the nearest of the known names, or lists them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
