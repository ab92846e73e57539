"""Reads the fields of the package's dataclasses from their source, so that help needs no module that they are in."""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAMES = {
    "Line": "TEXT",
    "Lines": "TEXT...",
    "Pairs": "CLASS=TEXT...",
    **{name: name.upper() for name in ("int", "str", "float", "Path")},
}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A class, or a name that stands for a type.

    Attributes:
      path: its file.
      node: its definition.
    """

    path: Path
    node: ast.ClassDef | ast.expr

    @property
    def name(self) -> str:
        """The name of a class."""
        return self.node.name if isinstance(self.node, ast.ClassDef) else ast.unparse(self.node)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a dataclass.

    Attributes:
      name: its name.
      values: what it takes, such as INT or {none,dots}; "" for a switch.
      help: its entry in the docstring.
      default: its default as Python code; None if it has none, or one that is no literal.
      nested: the dataclass that it holds; None if it is an option.
    """

    name: str
    values: str
    help: str
    default: str | None
    nested: Declaration | None = None


def declaration(module: str, name: str) -> Declaration:
    """Returns the definition of a name, in the module where it is written.

    Args:
      module: a module in which the name can be used.
      name: the name.

    Raises:
      LookupError: the module does not define or import it.
    """
    return _find(_file(module), name)


def table(module: str, name: str) -> dict[str, Declaration]:
    """Returns a registry: a dict of classes that a module defines under a name.

    Raises:
      LookupError: there is none, or what it holds is not defined or imported in the module.
    """
    path = _file(module)
    found = _find(path, name).node
    if not isinstance(found, ast.Dict):
        raise LookupError(f"{path}: {name} is not a dict")
    keys = (ast.literal_eval(key) for key in found.keys if key is not None)
    return {key: _find(path, ast.unparse(value)) for key, value in zip(keys, found.values, strict=True)}


def summary(kind: Declaration) -> str:
    """Returns the first line of a class's docstring."""
    return _docstring(kind).partition("\n")[0]


def fields(kind: Declaration) -> dict[str, Field]:
    """Returns the fields of a dataclass by name, those of its bases first, without those that no option sets."""
    assert isinstance(kind.node, ast.ClassDef)
    found: dict[str, Field] = {}
    for base in reversed(kind.node.bases):
        name = base.value if isinstance(base, ast.Subscript) else base  # of a generic class
        with_fields = _find_class(kind.path, name)
        found |= {} if with_fields is None else fields(with_fields)
    texts = _attributes(_docstring(kind))
    for line in kind.node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_option(line.annotation):
            found[line.target.id] = _field(kind.path, line, texts.get(line.target.id, ""))
    return {name: dataclasses.replace(field, help=texts.get(name, field.help)) for name, field in found.items()}


def _field(path: Path, line: ast.AnnAssign, text: str) -> Field:
    assert isinstance(line.target, ast.Name)
    return Field(line.target.id, _values(path, line.annotation), text, literal(line.value), _nested(path, line))


def literal(value: ast.expr | None) -> str | None:
    """Returns an expression as Python code if it is a literal, and otherwise None."""
    if value is None:
        return None
    try:
        return repr(ast.literal_eval(value))
    except ValueError:
        return None


def _is_option(annotation: ast.expr) -> bool:
    words = ast.unparse(annotation)
    return "ClassVar" not in words and "Suppress" not in words


def _nested(path: Path, line: ast.AnnAssign) -> Declaration | None:
    """Returns the dataclass of a field that holds one."""
    return _find_class(path, _plain(line.annotation))


def _find_class(path: Path, annotation: ast.expr) -> Declaration | None:
    if isinstance(annotation, ast.Subscript):
        annotation = annotation.value
    if not isinstance(annotation, ast.Name) or annotation.id in _NAMES:
        return None
    try:
        found = _find(path, annotation.id)
    except LookupError:
        return None
    return found if isinstance(found.node, ast.ClassDef) else None


def _values(path: Path, annotation: ast.expr) -> str:
    """Returns what a type takes on the command line."""
    annotation = _plain(annotation)
    words = ast.unparse(annotation)
    if words == "bool":
        return ""
    if words in _NAMES:
        return _NAMES[words]
    if isinstance(annotation, ast.BinOp):
        return _or_none(_values(path, annotation.left))
    if isinstance(annotation, ast.Subscript):
        assert isinstance(annotation.value, ast.Name)
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if annotation.value.id == "Literal":
            return f"{{{','.join(str(ast.literal_eval(word)) for word in inner)}}}"
        return f"[{_values(path, inner[0])} ...]"
    if isinstance(annotation, ast.Name):
        try:
            found = _find(path, annotation.id)
        except LookupError:
            return annotation.id.upper()
        if not isinstance(found.node, ast.ClassDef):
            return _values(found.path, found.node)
    return "VALUE"


def _or_none(values: str) -> str:
    return f"{{None,{values[1:]}" if values.startswith("{") else f"None|{values}"


def _plain(annotation: ast.expr) -> ast.expr:
    """Returns a type without annotations."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return annotation.slice.elts[0]
    return annotation


def _docstring(kind: Declaration) -> str:
    assert isinstance(kind.node, ast.ClassDef)
    return ast.get_docstring(kind.node) or ""


def _attributes(docstring: str) -> Mapping[str, str]:
    """Returns the entries of the section Attributes by name, each in one line."""
    _, _, section = docstring.partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", section, maxsplit=1)[0]
    entries = re.split(r"^  (?=\w+:)", section, flags=re.MULTILINE)
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries if entry.strip())
    return {name: text for name, _, text in pairs}


def _find(path: Path, name: str) -> Declaration:
    names = _definitions(path)
    if name not in names:
        raise LookupError(f"{path} does not define {name}")
    found = names[name]
    return _find(_file(found), name) if isinstance(found, str) else Declaration(path, found)


@functools.cache
def _definitions(path: Path) -> Mapping[str, ast.ClassDef | ast.expr | str]:
    """Returns the classes and values that a module defines, and for imported names their modules, by name."""
    return dict(_defined(ast.parse(path.read_text(encoding="utf-8"))))


def _defined(module: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.expr | str]]:
    for line in module.body:
        if isinstance(line, ast.ClassDef):
            yield line.name, line
        elif isinstance(line, ast.ImportFrom) and (line.module or "").startswith("spt_jax"):
            yield from ((name.name, line.module or "") for name in line.names)
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, line.value
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            yield line.target.id, line.value


def _file(module: str) -> Path:
    """Returns the file of a module of this package."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
