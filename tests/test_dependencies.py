"""What the package imports is what pyproject.toml declares."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import spt_jax
from spt_jax.runtime.extras import EXTRAS

PACKAGE = Path(spt_jax.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}  # those whose name differs from the module's


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, those of other extras of this package included."""
    found: set[str] = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == "spt_jax":
            for extra in extras.split(","):
                found |= names(PROJECT["optional-dependencies"][extra])
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def imported() -> Iterator[tuple[str, str]]:
    """Every file, and each top-level module outside the standard library that it imports or loads as an extra."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "load_extra":
                modules = [node.args[0].value]
            for module in modules:
                top = module.partition(".")[0]
                if top != "spt_jax" and top not in sys.stdlib_module_names:
                    yield str(file.relative_to(PACKAGE)), top


def distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module, module.lower().replace("_", "-"))


MODULES = {module for _, module in imported()}


def test_every_import_is_declared():
    required = names(PROJECT["dependencies"])
    undeclared = {
        f"{file} imports {module}"
        for file, module in imported()
        if module not in EXTRAS and distribution(module) not in required
    }
    assert not undeclared


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_an_optional_module_is_in_the_extra_that_its_message_names(module: str):
    assert module in MODULES
    declared = names(PROJECT["optional-dependencies"][EXTRAS[module]])
    assert distribution(module) in declared
    assert distribution(module) not in names(PROJECT["dependencies"])


def test_every_declared_dependency_is_imported():
    used = {distribution(module) for module in MODULES - set(EXTRAS)}
    assert names(PROJECT["dependencies"]) <= used
