"""Reads from a config file, without running it, which fields it sets."""

import ast
import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from spt_jax.experiment import declared
from spt_jax.experiment.declared import Declaration
from spt_jax.experiment.mapping_nodes import SUFFIXES, Node, read_nodes

DEFAULT_METHOD = "prompt_tuning"  # of a YAML or JSON file
_WITH_NAME = "Path(__file__).with_name"
_REPLACE = ("replace", "dataclasses.replace")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config file sets.

    Attributes:
      fields: for each class that it makes, the fields that it sets, as the file has them.
      method: the name of the method.
      objective: the name of the objective; None for the default of the task.
    """

    fields: Mapping[str, Mapping[str, str]]
    method: str
    objective: str | None


def read_settings(
    path: Path, methods: Mapping[str, Declaration], objectives: Mapping[str, Declaration]
) -> Settings | None:
    """Returns what a config file sets.

    Args:
      path: the file.
      methods: the registered methods.
      objectives: the registered objectives.

    Returns:
      The settings; None if they cannot be read without running the file, as with a method that is defined in it, or if
      the file cannot be read.
    """
    try:
        if path.suffix in SUFFIXES:
            return _of_mapping(read_nodes(path), methods, objectives)
        experiment = declared.declaration("spt_jax.config", "ExperimentConfig")
        classes = {kind.name for kind in (*_held(experiment), *methods.values(), *objectives.values())}
        return _of_calls(_calls(path, frozenset(classes)), methods, objectives)
    except (OSError, SyntaxError, ValueError, LookupError):  # ConfigError is a ValueError
        return None


def plain(code: str) -> str:
    """Returns text of Python code as it is typed on the command line; other values as code."""
    try:
        value = ast.literal_eval(code)
    except (ValueError, SyntaxError):
        return code
    return value if isinstance(value, str) and re.fullmatch(r"[^\s\\'\"]+", value) else code


def _of_calls(
    fields: dict[str, dict[str, str]], methods: Mapping[str, Declaration], objectives: Mapping[str, Declaration]
) -> Settings | None:
    chosen = [name for name, kind in methods.items() if kind.name in fields]
    over = [name for name, kind in objectives.items() if kind.name in fields]
    if "over" in fields.get("LossConfig", {}):
        over.append(ast.literal_eval(fields["LossConfig"]["over"]))
    if len(chosen) != 1 or len(over) > 1:
        return None
    return Settings(fields, chosen[0], next(iter(over), None))


def _held(kind: Declaration) -> Iterator[Declaration]:
    """Yields a dataclass and those that its fields hold."""
    yield kind
    for field in declared.fields(kind).values():
        if field.nested is not None:
            yield from _held(field.nested)


def _calls(path: Path, classes: frozenset[str], above: tuple[Path, ...] = ()) -> dict[str, dict[str, str]]:
    """Returns the keywords of the calls in a Python config, those of the config that it varies included.

    Args:
      path: the config.
      classes: the names of the classes of configs.
      above: the configs that vary it.

    Raises:
      LookupError: they do not say what the config is: a class is called twice or with arguments without keywords, a
        section has values that are not written in the file, or the config is a variant of itself.
    """
    above = (*above, path.resolve())
    module = ast.parse(path.read_text(encoding="utf-8"))
    assigned = _assigned_once(module)
    aliases = {
        name.asname: name.name
        for line in ast.walk(module)
        if isinstance(line, ast.ImportFrom)
        for name in line.names
        if name.asname is not None
    }

    def called(node: ast.Call) -> str:
        name = ast.unparse(node.func)
        last = aliases.get(name, name).rpartition(".")[2]
        return last if last in classes else name

    def code(value: ast.expr) -> str:
        constant = assigned.get(value.id) if isinstance(value, ast.Name) else value
        return declared.literal(constant) or ast.unparse(value)

    def check_section(value: ast.expr) -> None:
        own = assigned.get(value.id) if isinstance(value, ast.Name) else value
        if not isinstance(own, ast.Call) or called(own).removesuffix(".of") not in classes:  # as in LossConfig.of
            raise LookupError(f"{path}: {ast.unparse(value)} is not the call of a class of configs")

    found: dict[str, dict[str, str]] = {}
    varied: dict[str, dict[str, str]] = {}
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        if name in classes and (name in found or node.args or any(word.arg is None for word in node.keywords)):
            raise LookupError(f"{path}: the calls of {name} do not say its fields")
        if name == "ExperimentConfig" or name in _REPLACE:
            for word in node.keywords:
                check_section(word.value)
        found[name] = {word.arg: code(word.value) for word in node.keywords if word.arg is not None}
        if name == _WITH_NAME:
            other = path.with_name(ast.literal_eval(node.args[0]))
            if other.resolve() in above:
                raise LookupError(f"{path}: the config is a variant of itself")
            varied = _calls(other, classes, above)
    replaced = varied.get("ExperimentConfig", {}).get("method", "").partition("(")[0]
    return {**{name: own for name, own in varied.items() if name != replaced}, **found}


def _assigned_once(module: ast.Module) -> dict[str, ast.expr]:
    """Returns the values of the names that a module assigns once, in any scope."""
    nodes = list(ast.walk(module))
    counts = collections.Counter(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    counts.update(node.arg for node in nodes if isinstance(node, ast.arg))
    return {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and counts[node.targets[0].id] == 1
    }


def _of_mapping(root: Node, methods: Mapping[str, Declaration], objectives: Mapping[str, Declaration]) -> Settings:
    sections = _entries(root)
    method = _word(sections.get("method"), "name") or DEFAULT_METHOD
    over = _word(sections.get("loss"), "over")
    fields: dict[str, dict[str, str]] = {}
    for name, field in declared.fields(declared.declaration("spt_jax.config", "ExperimentConfig")).items():
        kind = methods[method] if name == "method" else field.nested
        if name in sections and kind is not None:
            fields |= _section(kind, sections[name])
    if over is not None and "loss" in sections:
        fields |= _section(objectives[over], sections["loss"])
    return Settings(fields, method, over)


def _section(kind: Declaration, node: Node) -> dict[str, dict[str, str]]:
    own = _entries(node)
    found = {kind.name: {name: repr(_value(value)) for name, value in own.items()}}
    for name, field in declared.fields(kind).items():
        if name in own and field.nested is not None:
            found |= _section(field.nested, own[name])
    return found


def _entries(node: Node) -> Mapping[str, Node]:
    if not isinstance(node.value, Mapping):
        raise LookupError(f"{node.value!r} is not a mapping")
    return node.value


def _value(node: Node) -> object:
    if isinstance(node.value, Mapping):
        return {name: _value(own) for name, own in node.value.items()}
    return [_value(own) for own in node.value] if isinstance(node.value, list) else node.value


def _word(node: Node | None, name: str) -> str | None:
    own = node.value.get(name) if node is not None and isinstance(node.value, Mapping) else None
    return own.value if own is not None and isinstance(own.value, str) else None
