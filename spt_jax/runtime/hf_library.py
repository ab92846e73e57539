"""Imports transformers without the time that it spends on torch."""

import importlib
import os
import sys
from types import ModuleType

from spt_jax.runtime import signals

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def keep_torch() -> None:
    """Lets transformers find torch in this process, also in a program: for functions of the user that may need it.

    It has no effect after `import_transformers` in a program.
    """
    importlib.import_module("transformers")


def import_transformers() -> ModuleType:
    """Imports transformers, of which this package uses configs, tokenizers and chat templates: none needs torch.

    Where torch is installed, transformers imports it with the first config, which takes seconds. In the programs of
    this package, transformers is therefore made to find that torch is absent, unless one of them was imported before.
    In other processes, which may use the models of transformers, everything stays as it is. torch itself can be
    imported in either case.

    Returns:
      The module.
    """
    if not signals.is_program() or {"torch", "transformers"} & sys.modules.keys():
        return importlib.import_module("transformers")
    return import_without_torch()


def import_without_torch() -> ModuleType:
    """Imports transformers, for the first time in this process, as where torch is not installed.

    Returns:
      The module.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]  # documented: an import fails as if there were no torch
    shown = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # otherwise it says that there is no torch
    try:
        transformers = importlib.import_module("transformers")
        transformers.utils.is_torch_available()  # keeps its result
    finally:
        del sys.modules["torch"]
        os.environ.pop(_QUIET)
        if shown is not None:
            os.environ[_QUIET] = shown
    return transformers
