"""`spt-jax completion`: prints a script that completes commands, shipped configs and options in a shell.

Completing must be instant, and importing JAX takes seconds, so the script contains all words.
"""

import dataclasses
import functools
import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from spt_jax.commands import options
from spt_jax.commands.program import COMMANDS
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.shipped import shipped_configs
from spt_jax.prompts import METHODS
from spt_jax.runtime.signals import PROGRAM

SHELLS = ("bash", "zsh", "fish")


def main(argv: Sequence[str]) -> None:
    """Prints the script of a shell.

    Raises:
      ConfigError: the shell is missing or unknown.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        hint = did_you_mean(argv[0], SHELLS) if argv else f"known: {', '.join(SHELLS)}"
        raise ConfigError(f"spt-jax completion takes the name of a shell; {hint}")
    words = {name: command_words(name) for name in COMMANDS}
    print(fish_script(words) if argv[0] == "fish" else bash_script(words, zsh=argv[0] == "zsh"))


def command_words(name: str) -> list[str]:
    """Returns what can follow a command: for jobs the shipped configs, and options, those of all methods included."""
    entry = COMMANDS[name]
    if name == "completion":
        return list(SHELLS)
    if entry.job is not None:
        kind = getattr(importlib.import_module(entry.load().__module__), entry.job)
        configs = shipped_configs()
        job = kind(config=load_config_file(configs["quickstart"]), workdir=Path("out"))
        return list(dict.fromkeys([*configs, *option_flags(job), *_method_flags(), "--help"]))
    return [*([] if entry.options is None else option_flags(getattr(options, entry.options))), "--help"]


@functools.cache
def _method_flags() -> list[str]:
    return [flag for method in METHODS.values() for flag in option_flags(method(), "method.")]


def option_flags(options: object, prefix: str = "") -> list[str]:
    """Returns the flags of a dataclass, those of nested ones included.

    Args:
      options: the dataclass, or an instance, whose values are then used to find nested ones.
      prefix: what precedes the names of its fields, such as "train.".
    """
    flags = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if isinstance(value, ExperimentConfig):
            flags += option_flags(value, prefix)
        elif dataclasses.is_dataclass(value):
            flags += option_flags(value, f"{prefix}{field.name}.")
        elif "Positional" not in repr(field.type):
            flags.append(f"--{prefix}{field.name}")
            if isinstance(value, bool):
                flags.append(f"--{prefix}no-{field.name}")
    return [flag.replace("_", "-") for flag in flags]


def bash_script(words: Mapping[str, Sequence[str]], *, zsh: bool = False) -> str:
    """Returns a completion script for bash, or with `zsh` for zsh, which can run those of bash.

    Args:
      words: what can follow each command.
    """
    cases = [f"        {name}) words={shlex.quote(' '.join(follow))} ;;" for name, follow in words.items()]
    return "\n".join(
        [
            *(["autoload -U +X bashcompinit && bashcompinit"] if zsh else []),
            "_spt_jax() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" words=""',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f'        COMPREPLY=($(compgen -W {shlex.quote(" ".join([*words, "--help", "--version"]))} -- "$current"))',
            "        return",
            "    fi",
            '    case "${COMP_WORDS[1]}" in',
            *cases,
            "    esac",
            '    case "$current" in',
            '        -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;',
            '        *) COMPREPLY=($(compgen -W "${words%% --*}" -- "$current") $(compgen -f -- "$current")) ;;',
            "    esac",
            "}",
            f"complete -o filenames -F _spt_jax {PROGRAM}",
        ]
    )


def fish_script(words: Mapping[str, Sequence[str]]) -> str:
    """Returns a completion script for fish.

    Args:
      words: what can follow each command.
    """
    lines = []
    for name, follow in words.items():
        summary = shlex.quote(COMMANDS[name].summary)
        lines.append(f"complete -c {PROGRAM} -f -n __fish_use_subcommand -a {name} -d {summary}")
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c {PROGRAM} {condition} -l {word[2:]}" for word in follow if word.startswith("--")]
        lines += [f"complete -c {PROGRAM} {condition} -a {word}" for word in follow if not word.startswith("--")]
    return "\n".join(lines)
