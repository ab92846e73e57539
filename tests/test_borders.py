"""What the package exports has types."""

import ast
import inspect
import textwrap
from collections.abc import Iterator

import pytest

import spt_jax

EXPORTED = [
    name
    for name, value in ((name, getattr(spt_jax, name)) for name in spt_jax.__all__)
    if inspect.isclass(value) or inspect.isfunction(value)
]


def untyped(tree: ast.Module) -> Iterator[str]:
    """Public functions and fields without a type, or with `Any` as their type."""
    (definition,) = tree.body
    members = definition.body if isinstance(definition, ast.ClassDef) else [definition]
    for node in members:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Any":
            yield ast.unparse(node.target)
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            own = [argument for argument in (*node.args.args, *node.args.kwonlyargs) if argument.arg != "self"]
            annotations = {argument.arg: argument.annotation for argument in own} | {"returns": node.returns}
            for name, annotation in annotations.items():
                absent = annotation is None and (name, node.name) != ("returns", "__init__")
                if absent or (annotation is not None and ast.unparse(annotation) == "Any"):
                    yield f"{node.name}: {name}"


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_has_types(name):
    source = textwrap.dedent(inspect.getsource(getattr(spt_jax, name)))
    assert not list(untyped(ast.parse(source)))
