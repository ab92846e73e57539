"""docs/api has every public name, and every public function documents its arguments, its result and its errors."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest

from tests.markdown import ROOT

# Modules whose `__all__` is public, and modules of which everything without an underscore is.
LISTED = (
    "spt_jax",
    "spt_jax.config",
    "spt_jax.prompts",
    "spt_jax.bases.families",
    "spt_jax.models.quantized",
    "spt_jax.tasks",
    "spt_jax.training.objectives",
    "spt_jax.interop",
)
WHOLE = ("spt_jax.prompts.initializers", "spt_jax.prompts.transfer", "spt_jax.runtime.signals", "spt_jax.testing")
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)


def lookup(name: str) -> object:
    """The module or the attribute of a module that has this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def exported() -> dict[int, str]:
    """The public names, by the identity of what they name."""
    names = [f"{module}.{name}" for module in LISTED for name in importlib.import_module(module).__all__]
    return {id(lookup(name)): name for name in (*names, *WHOLE)}


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    found = {id(lookup(name)): name for name in listed}
    assert len(found) == len(listed)
    public = exported()
    assert [name for key, name in public.items() if key not in found] == []
    assert [name for key, name in found.items() if key not in public] == []


def defined(module: ModuleType) -> list[object]:
    """The public functions and classes of a module."""
    own = [value for name, value in vars(module).items() if not name.startswith("_")]
    return [value for value in own if getattr(value, "__module__", None) == module.__name__]


def public_code() -> list[type | FunctionType]:
    """The public functions and classes, without types such as `PromptParams`."""
    values = [lookup(name) for name in exported().values()]
    values = [part for value in values for part in (defined(value) if inspect.ismodule(value) else [value])]
    code = [value for value in values if inspect.isclass(value) or inspect.isfunction(value)]
    return [value for value in dict.fromkeys(code) if value.__module__.startswith("spt_jax.")]


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public functions, and the methods that public classes define first, with their full names."""
    for value in public_code():
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
        if isinstance(tree, ast.FunctionDef):
            yield f"{value.__module__}.{tree.name}", tree
            continue
        inherited = {name for base in value.__mro__[1:] for name in vars(base)}
        for node in tree.body:
            public = not getattr(node, "name", "_").startswith("_") and node.name not in inherited
            if isinstance(node, ast.FunctionDef) and (public or node.name == "__init__"):
                yield f"{value.__module__}.{tree.name}.{node.name}", node


def own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function contains, without the functions and classes inside it."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def undocumented(function: ast.FunctionDef) -> Iterator[str]:
    """What the docstring of a function leaves out.

    The summary of a property, and a method's summary that starts with "Returns", say what the result is.
    """
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    if not text:
        yield "docstring"
    if any("property" in ast.unparse(decorator) for decorator in function.decorator_list):
        return
    sections = SECTION.split(text)
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    given += [argument for argument in (function.args.vararg, function.args.kwarg) if argument]
    for argument in given:
        if argument.arg not in ("self", "cls") and not re.search(
            rf"^ +\**{argument.arg}:", bodies.get("Args", ""), re.MULTILINE
        ):
            yield argument.arg
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    is_method = static or any(argument.arg in ("self", "cls") for argument in given[:1])
    returned = "None" if function.returns is None else ast.unparse(function.returns)
    says = {"Returns", "Yields"} & {*bodies} or (is_method and text.startswith("Returns "))
    if returned not in ("None", "NoReturn", "Iterator[None]") and not says:
        yield "Returns"
    errors = [node.exc for node in own_nodes(function) if isinstance(node, ast.Raise) and node.exc is not None]
    if "Raises" not in bodies and any("NotImplementedError" not in ast.unparse(error) for error in errors):
        yield "Raises"


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in functions()])
def test_every_public_function_is_documented(function: ast.FunctionDef):
    assert list(undocumented(function)) == []


@pytest.mark.parametrize("value", [value for value in public_code() if dataclasses.is_dataclass(value)])
def test_every_field_is_documented(value: type):
    attributes = "".join((base.__doc__ or "").partition("Attributes:")[2] for base in value.__mro__)
    fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
    assert [name for name in fields if not re.search(rf"^ +(\w+, )*{name}(, \w+)*:", attributes, re.MULTILINE)] == []
