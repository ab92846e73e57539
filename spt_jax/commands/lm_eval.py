"""`spt-jax lm-eval`: the command line of EleutherAI's lm-evaluation-harness, with the model spt_jax.

spt-jax lm-eval run --model spt_jax --model_args prompt=out/trec/prompt --tasks hellaswag --batch_size 16
"""

import os
import sys
from collections.abc import Sequence

from spt_jax.interop.lm_eval import FEATURE, register
from spt_jax.runtime.extras import load_extra
from spt_jax.runtime.signals import PROGRAM


def main(argv: Sequence[str]) -> None:
    """Runs the harness.

    Args:
      argv: the words of its command line.

    Raises:
      ConfigError: the package lm_eval is not installed, or the model's arguments are invalid.
      CheckpointError: the prompt or the base is missing or damaged.
    """
    register()
    harness = load_extra("lm_eval.__main__", FEATURE)
    # The harness forks processes to bootstrap some metrics, and a fork of a process that runs JAX may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    before = sys.argv
    sys.argv = [f"{PROGRAM} lm-eval", *argv]
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
