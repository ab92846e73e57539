"""The program `spt-jax`: finds a command and runs it.

The modules of a command are imported when it is run: importing JAX takes seconds, and neither `--help` nor an unknown
command needs it.
"""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import spt_jax
from spt_jax.errors import did_you_mean
from spt_jax.runtime.signals import PROGRAM


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command.

    Attributes:
      summary: what it does, in one line.
      module: its module in `spt_jax.commands`.
      attribute: a function of the words after the command, or a dataclass of options with a method `run`.
      starts_jax: whether its module imports JAX. If not, the attribute is a function without arguments.
      options: for a command that starts from a config, the `Job` with its options.
    """

    summary: str
    module: str
    attribute: str = "main"
    starts_jax: bool = True
    options: str | None = None

    def load(self) -> Any:
        """Imports the function or the dataclass."""
        return getattr(importlib.import_module(f"spt_jax.commands.{self.module}"), self.attribute)


COMMANDS: dict[str, Entry] = {
    "train": Entry("train a soft prompt, and compare it with hand-written prompts", "train", options="Command"),
    "generate": Entry("answer texts with a saved prompt", "ask", "Generate"),
    "evaluate": Entry("score a saved prompt on a data set", "ask", "Evaluate"),
    "inspect": Entry("describe a saved prompt and the effect of each of its rows", "inspect", "Inspect"),
    "similar": Entry("rank saved prompts as initial values for a new task", "inspect", "Similar"),
    "sweep": Entry("train prompts with many settings, and report the best", "sweep", options="Sweep"),
    "find-rate": Entry("suggest a learning rate for a config", "find_rate", options="FindRate"),
    "compare": Entry("compare saved prompts with the alternatives to them", "compare", options="Compare"),
    "report": Entry("write the report of a work directory again", "report", "MakeReport"),
    "serve": Entry("serve a base and a directory of prompts over HTTP", "serve", "Serve"),
    "import": Entry("convert a prompt of another library", "convert", "Import"),
    "export": Entry("convert a saved prompt to the format of another library", "convert", "Export"),
    "push": Entry("upload a saved prompt to the Hugging Face hub", "hub", "Push"),
    "pull": Entry("download a prompt from the Hugging Face hub", "hub", "Pull"),
    "lm-eval": Entry("run lm-evaluation-harness with the model spt_jax", "lm_eval"),
    "configs": Entry("list the configs that ship with the package", "configs", starts_jax=False),
    "env": Entry("show versions, devices, and what an accelerator needs", "env", starts_jax=False),
    "completion": Entry("print a completion script for bash, zsh or fish", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the command and its words; default those of this process.

    Returns:
      The exit code: 0 done, 1 failed, 2 invalid command line, 130 or 143 stopped by a signal after saving.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "--version":
        print(f"{PROGRAM} {spt_jax.__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: no command {words[0]!r}; {did_you_mean(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:])


def usage() -> str:
    """Returns the text of `--help`."""
    lines = [f"  {name:<11} {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Soft prompt tuning of frozen language models in JAX and Flax.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this text; after a command, its options",
            "  --version   show the version",
        ]
    )


def run_command(name: str, words: Sequence[str], program: str | None = None) -> int:
    """Runs a command; turns errors into a message on stderr.

    Args:
      name: the command.
      words: the words after it.
      program: what the words were typed after, if that is not `spt-jax NAME`.

    Returns:
      The exit code, as in `main`.
    """
    entry = COMMANDS[name]
    if not entry.starts_jax:
        return _run_without_options(entry.load(), name, words)
    if "jax" not in sys.modules:
        print(f"{program or f'{PROGRAM} {name}'}: loading JAX", file=sys.stderr, flush=True)
    importlib.import_module("spt_jax.commands.exports")  # which fills the registries of tasks, methods and objectives
    from spt_jax.experiment.command_line import exit_code

    return exit_code(_bound(entry.load(), f"{PROGRAM} {name}", words, program))


def _run_without_options(function: Callable[[], None], name: str, words: Sequence[str]) -> int:
    """Runs a command that takes no arguments, or prints its docstring as help; returns the exit code."""
    if words and words[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} {name}\n\n{inspect.getdoc(function)}")
    elif words:
        print(f"error: {PROGRAM} {name} takes no arguments, such as {words[0]!r}", file=sys.stderr)
        return 2
    else:
        function()
    return 0


def _bound(target: Any, prog: str, words: Sequence[str], program: str | None) -> Callable[[], None]:
    """Returns the command with its words as a function without arguments."""
    if isinstance(target, type):
        import tyro

        return lambda: tyro.cli(target, args=list(words), prog=prog).run()
    if program is not None:
        return lambda: target(words, program)
    return lambda: target(words)
