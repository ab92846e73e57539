"""`spt-jax completion`: prints a script that completes commands, shipped configs and options in a shell.

Completing must be instant, and importing JAX takes seconds, so the script contains all words.
"""

import argparse
import dataclasses
import functools
import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from spt_jax.commands.program import COMMANDS
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.command_line import Command, Job
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.shipped import shipped_configs
from spt_jax.prompts import METHODS
from spt_jax.runtime.signals import PROGRAM

SHELLS = ("bash", "zsh", "fish")
HELP = """usage: spt-jax completion {bash,zsh,fish}

Prints a completion script. For bash or zsh, put into ~/.bashrc or ~/.zshrc (after compinit):
  source FILE
where FILE is the output, or for fish save the output as
  ~/.config/fish/completions/spt-jax.fish"""


def main(argv: Sequence[str]) -> None:
    """Prints the script of a shell.

    Raises:
      ConfigError: the shell is missing or unknown.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return
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
    if entry.options is not None:
        kind = getattr(importlib.import_module(entry.load().__module__), entry.options)
        return list(dict.fromkeys([*shipped_configs(), *_job_flags(kind, "prompt_tuning"), *_method_flags()]))
    return _flags(tyro.extras.get_parser(entry.load())) if entry.starts_jax else ["--help"]


@functools.cache
def _method_flags() -> list[str]:
    return [flag for name in METHODS for flag in _job_flags(Command, name)]


def _job_flags(kind: type[Job[Any]], method: str) -> list[str]:
    config = load_config_file(shipped_configs()["quickstart"])
    default = kind(config=dataclasses.replace(config, method=METHODS[method]()), workdir=Path("out"))
    return _flags(tyro.extras.get_parser(kind[METHODS[method]], default=default))  # type: ignore[index]


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the long options of a parser; those that tyro adds for itself are left out."""
    options = [option for action in parser._actions for option in action.option_strings]
    return [option for option in options if option.startswith("--") and not option.startswith("--tyro-")]


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
