"""The configs that ship with the package, by name."""

import ast
from pathlib import Path

from spt_jax.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parents[1] / "configs"


def shipped_configs() -> dict[str, Path]:
    """Returns the files of the configs by name, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("_")}


def config_summary(path: Path) -> str:
    """Returns the first line of a config file's docstring, or "" if it has none. The file is not run."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def config_path(name: str) -> Path:
    """Returns a config's file.

    Args:
      name: a file ending in .py, .yaml, .yml or .json, or the name of a config that ships with the package.

    Raises:
      ConfigError: no config of this name ships with the package.
    """
    if Path(name).name != name or Path(name).suffix:
        return Path(name)
    shipped = shipped_configs()
    if name not in shipped:
        raise ConfigError(
            f"no config named {name!r} ships with the package, and the name of a file ends in .py, .yaml or .json;"
            f" {did_you_mean(name, shipped)}"
        )
    return shipped[name]
