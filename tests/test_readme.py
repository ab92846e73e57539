"""README's Python runs as it stands there, and its commands name files and options that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_learns():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert float(names["metrics"]["loss"]) < 0.1  # Two examples: a coin would have 0.69.


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:configs|colab|docs|benchmarks|spt_jax)/[\w/.-]+\w", README)))
)
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists()


def test_every_method_is_named():
    from spt_jax.prompts import METHODS

    assert [name for name in METHODS if f"`{name}`" not in README] == []
    assert [
        name for name in METHODS if name != "prompt_tuning" and not (ROOT / "configs" / f"{name}.py").exists()
    ] == []
