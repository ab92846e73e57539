"""Packages that only some features need: the optional dependencies in pyproject.toml."""

import importlib
import importlib.util
from types import ModuleType

from spt_jax.errors import ConfigError

# The extra that installs each module.
EXTRAS = {
    "datasets": "datasets",
    "matplotlib": "plots",
    "rouge_score": "metrics",
    "sacrebleu": "metrics",
    "tensorboardX": "tensorboard",
    "wandb": "wandb",
    "s3fs": "s3",
    "gcsfs": "gs",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "lm_eval": "lm-eval",
    "gguf": "gguf",
}


def install_line(module: str) -> str:
    """Returns the command that installs a module's extra."""
    return f"pip install 'spt_jax[{EXTRAS[module]}]'"


def installed(module: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def check_installed(module: str, feature: str) -> None:
    """Checks that a module can be imported, without importing it.

    Raises:
      ConfigError: it is not installed; the message names the feature and the extra.
    """
    if not installed(module):
        raise ConfigError(f"{feature} needs {module}, which is not installed: {install_line(module)}")


def load_extra(module: str, feature: str) -> ModuleType:
    """Imports a module of an extra.

    Args:
      module: its full name, such as "matplotlib.figure".
      feature: what needs it, for the message.

    Raises:
      ConfigError: it is not installed; the message names the feature and the extra.
    """
    check_installed(module.partition(".")[0], feature)
    return importlib.import_module(module)
