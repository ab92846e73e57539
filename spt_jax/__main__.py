"""`python -m spt_jax COMMAND`: what to do with a saved prompt, and jobs that start from a config file."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from spt_jax.commands import compare, find_rate, sweep
from spt_jax.commands.ask import Evaluate, Generate
from spt_jax.commands.convert import Export, Import
from spt_jax.commands.inspect import Inspect, Similar
from spt_jax.commands.serve import Serve
from spt_jax.errors import SptError, did_you_mean
from spt_jax.training.loop import Stopped

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
    """Exit codes: 0 done, 1 failed, 2 the words on the command line are wrong, 130 or 143 stopped after saving."""
    known = [*JOBS, *COMMANDS]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m spt_jax {{{','.join(known)}}} ...")
        return 0 if argv else 2
    if argv[0] not in known:
        print(f"error: no command {argv[0]!r}; {did_you_mean(argv[0], known)}", file=sys.stderr)
        return 2
    try:
        if argv[0] in JOBS:
            JOBS[argv[0]](argv[1:])
        else:
            tyro.cli(COMMANDS[argv[0]], args=list(argv[1:]), prog=f"python -m spt_jax {argv[0]}").run()
    except SptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"{stopped}. Go on with --resume", file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
