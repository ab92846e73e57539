"""The package's folders depend on each other in one direction, and every file is about one thing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import spt_jax
from spt_jax.runtime.extras import EXTRAS

PACKAGE = Path(spt_jax.__file__).parent
# A folder or module imports only those before it.
ORDER = (
    "errors",
    "options",
    "runtime",
    "models",
    "bases",
    "data",
    "prompts",
    "inference",
    "evaluation",
    "tasks",
    "training",
    "experiment",
    "config",
    "studies",
    "interop",
    "api",
    "reports",
    "serving",
    "testing",
    "configs",
    "commands",
    "__init__",
    "__main__",
)


def modules() -> Iterator[tuple[Path, str]]:
    """Every source file and the folder or module of the package that it belongs to."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file, file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """The full names of the package's modules that a file imports."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("spt_jax."))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spt_jax":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in names)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or path.is_dir()


def test_every_folder_has_its_place():
    assert {part for _, part in modules()} == set(ORDER)


def test_no_import_runs_up():
    up = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file, part in modules()
        for name in imported(file)
        if name != "spt_jax" and ORDER.index(name.split(".")[1]) > ORDER.index(part)
    ]
    assert not up


def test_no_two_files_import_each_other():
    """But for a saved prompt, which an initializer reads: it holds a method, which holds an initializer."""
    edges = {file: set(imported(file, inside_functions=False)) for file, _ in modules()}
    names = {".".join(("spt_jax", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in edges}
    remaining = {name: {other for other in edges[file] if other in names} for name, file in names.items()}
    while free := [name for name, others in remaining.items() if not others & set(remaining)]:
        for name in free:
            del remaining[name]
    assert not remaining


def test_no_file_is_too_long():
    assert not {str(file): n for file, _ in modules() if (n := len(file.read_text().splitlines())) > 450}


def test_the_top_level_holds_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_the_package_needs_no_extra():
    """Every command can be loaded after `pip install spt_jax`, without what the server, the logs and the tests need."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({[*EXTRAS, "httpx", "ray", "torch", "peft"]}))
from spt_jax import *
from spt_jax.commands.program import COMMANDS
import train
for entry in COMMANDS.values():
    entry.load()
"""
    subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=True)
