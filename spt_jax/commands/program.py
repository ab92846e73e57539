"""The program `spt-jax`: finds a command and runs it.

The modules of a command are imported when it is run: importing JAX takes seconds, and neither `--help` nor an unknown
command needs it.
"""

import dataclasses
import gc
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import spt_jax
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.config_help import config_help
from spt_jax.experiment.usage import job_usage
from spt_jax.runtime.signals import PROGRAM


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command.

    Attributes:
      summary: what it does, in one line.
      module: its module in `spt_jax.commands`.
      attribute: a function of the words after the command or, if it has `options`, of those.
      starts_jax: whether its module imports JAX. If not, the attribute is a function without arguments.
      options: the dataclass in `spt_jax.commands.options` that the words are read into.
      job: for a command that starts from a config, the `Job` in its module with its options.
      help: the text of --help, if it does not follow from the options.
      other_program: whether the words are those of another program, which shows the help of its own commands.
    """

    summary: str
    module: str
    attribute: str = "main"
    starts_jax: bool = True
    options: str | None = None
    job: str | None = None
    help: str | None = None
    other_program: bool = False

    def load(self) -> Any:
        """Imports the function."""
        return getattr(importlib.import_module(f"spt_jax.commands.{self.module}"), self.attribute)


_PYTHON_FORMAT = warnings.formatwarning
# Objects and collections after which Python collects garbage, for a program that has imported JAX.
_COLLECT_AFTER = (50_000, 20, 50)

COMPLETION_HELP = """usage: spt-jax completion {bash,zsh,fish}

Prints a completion script. Save it to a file, and add `source FILE` to
~/.bashrc, or to ~/.zshrc after compinit. For fish, save it as
~/.config/fish/completions/spt-jax.fish. Print it again after an update."""

LM_EVAL_HELP = """usage: spt-jax lm-eval COMMAND ...

Runs EleutherAI's lm-evaluation-harness with the model spt_jax, for example

  spt-jax lm-eval run --model spt_jax --model_args prompt=out/trec/prompt \\
      --tasks hellaswag --batch_size 16

`spt-jax lm-eval run --help` shows the options of the harness, which needs
pip install 'spt_jax[lm-eval]'."""

COMMANDS: dict[str, Entry] = {
    "train": Entry("train a soft prompt, and compare it with hand-written prompts", "train", job="Command"),
    "generate": Entry("answer texts with a saved prompt", "ask", "generate_answers", options="Generate"),
    "evaluate": Entry("score a saved prompt on a data set", "ask", "evaluate_prompt", options="Evaluate"),
    "inspect": Entry(
        "describe a saved prompt and the effect of each of its rows", "inspect", "inspect_prompt", options="Inspect"
    ),
    "similar": Entry(
        "rank saved prompts as initial values for a new task", "inspect", "similar_prompts", options="Similar"
    ),
    "sweep": Entry("train prompts with many settings, and report the best", "sweep", job="Sweep"),
    "find-rate": Entry("suggest a learning rate for a config", "find_rate", job="FindRate"),
    "compare": Entry("compare saved prompts with their alternatives", "compare", job="Compare"),
    "report": Entry("rewrite the report of a work directory", "report", "make_report", options="MakeReport"),
    "remember": Entry("make a prompt from a text, without training", "remember", "remember_text", options="Remember"),
    "compose": Entry("put the prefixes of several prompts into one", "compose", "compose_prompts", options="Compose"),
    "serve": Entry("serve a base and a directory of prompts over HTTP", "serve", "serve", options="Serve"),
    "import": Entry("convert a prompt of another library", "convert", "import_prompt", options="Import"),
    "export": Entry(
        "convert a saved prompt to the format of another library", "convert", "export_prompt", options="Export"
    ),
    "push": Entry("upload a saved prompt to the Hugging Face hub", "hub", "push_prompt", options="Push"),
    "pull": Entry("download a prompt from the Hugging Face hub", "hub", "pull_prompt", options="Pull"),
    "lm-eval": Entry(
        "run lm-evaluation-harness with the model spt_jax", "lm_eval", help=LM_EVAL_HELP, other_program=True
    ),
    "configs": Entry("list the configs that ship with the package", "configs", starts_jax=False),
    "env": Entry("show versions, devices, and what an accelerator needs", "env", starts_jax=False),
    "completion": Entry("print a completion script for bash, zsh or fish", "completion", help=COMPLETION_HELP),
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
        _show(usage())
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
    warnings.formatwarning = _formatted
    if not entry.starts_jax:
        return _run_without_options(entry.load(), name, words)
    typed = program or f"{PROGRAM} {name}"
    try:
        if {"-h", "--help"} & set(words) and (text := _help(entry, words, typed)) is not None:
            _show(text)
            return 0
        arguments = (*_arguments(entry, f"{PROGRAM} {name}", words), *([] if program is None else [program]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if "jax" not in sys.modules:
        print(f"{typed}: loading JAX", file=sys.stderr, flush=True)
        # Imports and traces make millions of objects that stay, and are searched for garbage again and again.
        gc.set_threshold(*_COLLECT_AFTER)
    importlib.import_module("spt_jax.commands.exports")  # which fills the registries of tasks, methods and objectives
    from spt_jax.experiment.command_line import exit_code

    return exit_code(lambda: entry.load()(*arguments))


def _formatted(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """Returns a warning for users without the line of code that it comes from, and others as Python shows them."""
    return f"warning: {message}\n" if category is UserWarning else _PYTHON_FORMAT(message, category, *place)


def _show(text: str) -> None:
    """Prints a text. It is no error if its reader ends early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process


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


def _help(entry: Entry, words: Sequence[str], typed: str) -> str | None:
    """Returns the text of --help; None if only the command itself can show it.

    Raises:
      ConfigError: no config of this name ships with the package.
    """
    first = words[0].startswith("-")
    if entry.job is None:
        return entry.help if first or not entry.other_program else None
    if first:
        return job_usage(f"{entry.summary[0].upper()}{entry.summary[1:]}.", typed)
    return config_help(f"spt_jax.commands.{entry.module}", entry.job, words, typed)


def _arguments(entry: Entry, prog: str, words: Sequence[str]) -> tuple[Any]:
    """Returns what the command's function is called with: its words, or the options that they are read into.

    Raises:
      ConfigError: an option has an invalid value.
    """
    if entry.options is None:
        return (words,)
    import tyro

    options = importlib.import_module("spt_jax.commands.options")
    return (tyro.cli(getattr(options, entry.options), args=list(words), prog=prog),)
