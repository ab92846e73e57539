"""`python -m spt_jax` is `spt-jax`."""

import sys

from spt_jax.commands.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
