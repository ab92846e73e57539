"""The help of commands that start from a config, without one. No module that it describes is imported."""

import ast
from collections.abc import Mapping
from pathlib import Path

from spt_jax.experiment.shipped import config_summary, shipped_configs

METHODS_FOLDER = Path(__file__).parents[1] / "prompts"


def job_usage(summary: str, program: str) -> str:
    """Returns the help: the shipped configs, the methods, and how to show the options.

    Args:
      summary: what the command does.
      program: the command, as it is typed.
    """
    configs = {name: config_summary(path) for name, path in shipped_configs().items()}
    return "\n".join(
        [
            f"usage: {program} CONFIG [--field value ...]",
            "",
            summary,
            "",
            "CONFIG is a file, or the name of a config that ships with the package:",
            *_columns(configs),
            "",
            "--method.name is one of:",
            *_columns(method_summaries()),
            "",
            f"{program} CONFIG --help lists all fields",
        ]
    )


def method_summaries() -> dict[str, str]:
    """Returns the first line of each method's docstring by the method's name, in the order of `METHODS`."""
    classes = {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for path in METHODS_FOLDER.glob("*.py")
        for node in _body(path)
        if isinstance(node, ast.ClassDef)
    }
    (table,) = (
        node.value
        for node in _body(METHODS_FOLDER / "__init__.py")
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
    )
    keys = (ast.literal_eval(key) for key in table.keys if key is not None)
    return {name: classes[ast.unparse(kind)] for name, kind in zip(keys, table.values, strict=True)}


def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _columns(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"  {name:<{width}}  {line}" for name, line in lines.items()]
