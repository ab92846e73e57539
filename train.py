"""The command `spt-jax train` for a checkout that is not installed.

python train.py configs/quickstart.py [--field value ...] [--resume | --overwrite] [--dry-run]
"""

# Must come first: it handles signals that arrive while the other modules are imported.
from spt_jax.runtime import signals  # noqa: F401

# isort: split
import sys
from collections.abc import Sequence

from spt_jax.commands.program import run_command


def main(argv: Sequence[str]) -> int:
    """Runs `spt-jax train`; returns the exit code."""
    return run_command("train", argv, "python train.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
