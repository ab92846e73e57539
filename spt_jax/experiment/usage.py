"""The help of commands that start from a config, without one. No module that it describes is imported."""

from collections.abc import Mapping, Sequence

from spt_jax.experiment import declared
from spt_jax.experiment.shipped import config_summary, shipped_configs


def job_usage(summary: str, program: str) -> str:
    """Returns the help: the shipped configs, the methods, and how to show the options.

    Args:
      summary: what the command does.
      program: the command, as it is typed.
    """
    configs = {name: config_summary(path) for name, path in shipped_configs().items()}
    return "\n".join(
        [
            f"usage: {program} CONFIG [--field value ...]",
            "",
            summary,
            "",
            "CONFIG is a file, or the name of a config that ships with the package:",
            *_columns(configs),
            "",
            "--method.name is one of:",
            *_columns(method_summaries()),
            "",
            f"{program} CONFIG --help lists all fields",
        ]
    )


def method_summaries() -> dict[str, str]:
    """Returns the first line of each method's docstring by the method's name, in the order of `METHODS`."""
    return {name: declared.summary(kind) for name, kind in declared.table("spt_jax.prompts", "METHODS").items()}


def last_value(words: Sequence[str], flag: str) -> str | None:
    """Returns the last value of a flag, or None.

    Args:
      words: the words of a command line.
      flag: the flag, such as "--method.name".
    """
    value = None
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            value = words[i + 1]
        if word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _columns(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"  {name:<{width}}  {line}" for name, line in lines.items()]
