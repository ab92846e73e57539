"""Config files: Python files with a function `get_config`, or YAML or JSON files with the fields of the config."""

import contextlib
import contextvars
import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.experiment.mapping_nodes import SUFFIXES
from spt_jax.experiment.mappings import read_mapping_config
from spt_jax.experiment.shipped import shipped_configs
from spt_jax.prompts import METHODS, Method

# The Python files that are being run, from the outermost to the one whose config is asked for.
_RUNNING: contextvars.ContextVar[tuple[Path, ...]] = contextvars.ContextVar("_RUNNING", default=())


def load_config_file(path: Path) -> ExperimentConfig[Any]:
    """Returns the result of a config file's `get_config()`, or the config that a YAML or JSON file holds.

    Raises:
      ConfigError: there is no such file (the message suggests a similar name), it has no `get_config`, it imports what
        does not exist, it sets an unknown field, it is a variant of itself, or as in `read_mapping_config`.
    """
    if not path.is_file():
        kinds = {".py", *SUFFIXES}
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        siblings = [str(p) for p in there if p.suffix in kinds and not p.name.startswith(".")]
        near = difflib.get_close_matches(str(path), siblings, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"config files there: {', '.join(sorted(siblings)) or 'none in that folder'}"
        )
        if path.stem in shipped_configs():
            hint += f"; the config that ships with the package is named {path.stem}, without a folder and .py"
        else:
            hint += "; `spt-jax configs` lists those that ship with the package"
        raise ConfigError(f"no config file {path}; {hint}")
    if path.suffix in SUFFIXES:
        return read_mapping_config(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python, YAML or JSON file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _running(path):
            spec.loader.exec_module(module)
            config = module.get_config()
    except AttributeError as error:
        raise ConfigError(f"{path}: {error}; a config file must define get_config() -> ExperimentConfig") from error
    except ImportError as error:
        moved = (error.name or "").startswith("spt_jax")
        hint = "; modules have moved: config files import from spt_jax.config and spt_jax.prompts" if moved else ""
        raise ConfigError(f"{path}: {error}{hint}") from error
    except (TypeError, SyntaxError) as error:
        raise ConfigError(f"{path}: {error}{_nearest_field(str(error))}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not an ExperimentConfig")
    return config


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """Keeps the file among those that are being run.

    Raises:
      ConfigError: it already is one of them.
    """
    files, own = _RUNNING.get(), path.resolve()
    if own in files:
        names = " -> ".join(map(str, (*files[files.index(own) :], own)))
        raise ConfigError(f"{path}: the config is a variant of itself ({names}); name another config file")
    token = _RUNNING.set((*files, own))
    try:
        yield
    finally:
        _RUNNING.reset(token)


def variant(path: Path, method: Method) -> Callable[[], ExperimentConfig[Any]]:
    """Returns the `get_config` of a config file that is another one with a different method.

    Args:
      path: the other config file.
      method: the method.

    Returns:
      A function without arguments.
    """
    return lambda: dataclasses.replace(load_config_file(path), method=method)


def _nearest_field(message: str) -> str:
    """Returns a suggestion for the message "unexpected keyword argument 'stepz'": the most similar config field."""
    if "unexpected keyword argument" not in message:
        return ""
    parts = [ExperimentConfig, *ExperimentConfig.__annotations__.values(), *METHODS.values()]
    fields = {f.name for part in parts if dataclasses.is_dataclass(part) for f in dataclasses.fields(part)}
    return "; " + did_you_mean(message.rsplit("'", 2)[1], fields)
