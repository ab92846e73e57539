"""Soft prompt tuning of frozen language models in JAX and Flax.

    base = spt_jax.load_base("starter")
    template = spt_jax.Template(prompt="<soft>{question}\\n", target="{answer}")
    result = spt_jax.fit(base, spt_jax.PromptTuning(length=20), template, records, validation=others)
    result.prompt.save("out/prompt")
    answers = spt_jax.load_prompt("out/prompt").generate(["What is a soft prompt?"])

`fit` is a layer over functions: `init_state`, `make_train_step` and others serve your own loops.

Arrays are named by their dimensions: B rows, T tokens, P virtual tokens, D width, L layers, N query heads, K key/value
heads, H head size, V vocabulary.
"""

# Must come first: it handles signals that arrive while the other modules are imported.
from spt_jax.runtime import signals

# isort: split
import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING or not signals.is_program():
    from spt_jax.commands.exports import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports the package's exports when one is needed: `spt-jax --help` must not wait seconds for JAX."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    exports = importlib.import_module(f"{__name__}.commands.exports")
    if name != "__all__" and name not in exports.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(exports, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module(f"{__name__}.commands.exports").__all__})
