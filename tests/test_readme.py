"""README's Python runs as it stands there, and its commands name files and options that exist."""

import re
from pathlib import Path

import pytest

from spt_jax.prompts import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_learns():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert float(names["metrics"]["loss"]) < 0.1  # Two examples: a coin would have 0.69.


FILES = sorted(set(re.findall(r"(?:configs|colab|docs|benchmarks|spt_jax)/[\w/.-]+\w", README)))


@pytest.mark.parametrize("path", FILES)
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists()


def test_every_method_is_named_and_has_a_config():
    assert [name for name in METHODS if f"`{name}`" not in README] == []
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert set(METHODS) - configs == {"prompt_tuning"}  # which is quickstart.py's
