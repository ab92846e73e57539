"""`python -m spt_jax COMMAND`: commands for saved prompts, and jobs that start from a config file."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from spt_jax.commands import compare, find_rate, sweep
from spt_jax.commands.ask import Evaluate, Generate
from spt_jax.commands.convert import Export, Import
from spt_jax.commands.inspect import Inspect, Similar
from spt_jax.commands.serve import Serve
from spt_jax.errors import did_you_mean
from spt_jax.experiment.command_line import exit_code

COMMANDS: dict[str, Any] = {
    "generate": Generate,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "import": Import,
    "export": Export,
    "similar": Similar,
    "serve": Serve,
}


# Commands that start from a config file, as train.py does.
JOBS: dict[str, Any] = {"sweep": sweep.main, "compare": compare.main, "find-rate": find_rate.main}


def main(argv: Sequence[str]) -> int:
    """Runs a command.

    Returns:
      The exit code: 0 done, 1 failed, 2 invalid command line, 130 or 143 stopped by a signal after saving.
    """
    known = [*JOBS, *COMMANDS]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m spt_jax {{{','.join(known)}}} ...")
        return 0 if argv else 2
    if argv[0] not in known:
        print(f"error: no command {argv[0]!r}; {did_you_mean(argv[0], known)}", file=sys.stderr)
        return 2
    words = argv[1:]
    if argv[0] in JOBS:
        return exit_code(lambda: JOBS[argv[0]](words))
    program = f"python -m spt_jax {argv[0]}"
    return exit_code(lambda: tyro.cli(COMMANDS[argv[0]], args=list(words), prog=program).run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
