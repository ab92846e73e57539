"""The scripts in `examples/` run as a stranger runs them, and the prompt does what they say."""

import os
import re
import subprocess
import sys

import pytest

from tests.markdown import ROOT
from tests.quick import QUICK_FLAGS


@pytest.mark.parametrize("name", ["linen_gpt", "nnx_gpt"])
def test_the_prompt_asks_for_the_colour(tmp_path, name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK_FLAGS}
    script = str(ROOT / "examples" / f"{name}.py")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"(\S+) without the prompt, (\S+) with it", run.stdout).groups())
    assert before < 0.4 and after > 0.9
    assert (tmp_path / "out" / name / "prompt.json").exists()
    (colour,) = re.search(r"^plum: +(\w+)$", run.stdout, re.MULTILINE).groups()
    assert colour in ("red", "green", "blue", "white")
