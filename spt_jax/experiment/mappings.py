"""Configs as YAML or JSON: nested mappings with the fields of `ExperimentConfig`, read by its types."""

import contextlib
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal

from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.experiment.mapping_nodes import Node, read_nodes
from spt_jax.prompts import METHODS
from spt_jax.training.config import LossConfig

INPUTS = "inputs"  # a field of config.json in a work directory that is not a setting

_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*)?\.?\d+([eE][-+]?\d+)?|[-+]?\d+\.([eE][-+]?\d+)?")
_NAMES: dict[Any, str] = {str: "text", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}


def read_mapping_config(path: Path) -> ExperimentConfig[Any]:
    """Returns the config of a YAML or JSON file.

    Fields that are left out have their defaults; `base.path`, `data.train` and `data.prompt` are then empty, and must
    be set on the command line. The default method is prompt_tuning.

    Args:
      path: the file, whose name ends in .yaml, .yml or .json.

    Raises:
      ConfigError: the file cannot be parsed, has an unknown or repeated field, or a value of another type or out of its
        range; the message names the field and, for YAML, the line.
    """
    return _Reader(path).experiment(read_nodes(path))


class _Reader:
    """Turns the nodes of one file into dataclasses."""

    def __init__(self, path: Path):
        self._path = path

    def experiment(self, root: Node) -> ExperimentConfig[Any]:
        """Returns the config; the fields of its method and loss depend on names in the file."""
        known = [field.name for field in dataclasses.fields(ExperimentConfig)]
        if isinstance(root.value, Mapping):  # config.json of a work directory also has digests of the inputs
            root = dataclasses.replace(root, value={k: own for k, own in root.value.items() if k != INPUTS})
        sections = self._fields(root, "", known)
        hints = typing.get_type_hints(ExperimentConfig, include_extras=True)
        chosen = sections.get("method", Node({}))
        name = self._word(chosen, "method", "name") or "prompt_tuning"
        if name not in METHODS:
            raise self._error(chosen, f"method.name is {name!r}; {did_you_mean(name, METHODS)}")
        hints["method"] = METHODS[name]
        values = {part: self._dataclass(hints[part], own, part) for part, own in sections.items() if part != "loss"}
        if (loss := sections.get("loss")) is not None:
            with self._located(loss):
                start = LossConfig().with_options(self._word(loss, "loss", "over"))
            values["loss"] = self._dataclass(type(start), loss, "loss", start)
        values.setdefault("method", METHODS[name]())
        for part in ("base", "data"):
            values.setdefault(part, self._dataclass(hints[part], Node({}), part))
        return ExperimentConfig(**values)

    def _dataclass(self, kind: Any, node: Node, where: str, start: Any = None) -> Any:
        """Returns a dataclass from the fields of a mapping, or `start` with these fields replaced."""
        hints = typing.get_type_hints(kind, include_extras=True)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        found = self._fields(node, where, [field.name for field in fields])
        values = {name: self._value(hints[name], own, f"{where}.{name}") for name, own in found.items()}
        if start is not None:
            with self._located(node):
                return dataclasses.replace(start, **values)
        for field in fields:
            has_default = field.default is not MISSING or field.default_factory is not MISSING
            if field.name not in values and not has_default:
                if _plain(hints[field.name]) is not str:
                    raise self._error(node, f"{where}.{field.name} must be given")
                values[field.name] = ""  # refused later, unless the command line sets it
        with self._located(node):
            return kind(**values)

    def _value(self, hint: Any, node: Node, where: str) -> Any:
        hint = _plain(hint)
        if dataclasses.is_dataclass(hint):
            return self._dataclass(hint, node, where)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        for kind in kinds:
            accepted, value = self._accepted(_plain(kind), node, where)
            if accepted:
                return value
        names = " or ".join(map(_name, kinds))
        shown = node.text if node.text is not None else _shown(node.value)
        raise self._error(node, f"{where} is {shown}; it must be {names}")

    def _accepted(self, kind: Any, node: Node, where: str) -> tuple[bool, Any]:
        """Returns whether a value has a type, and the value in that type."""
        value, origin = node.value, typing.get_origin(kind)
        if kind in (type(None), Any):  # a field of any type can only be set in Python
            return value is None, None
        if origin is Literal:
            value = node.text if node.text is not None else value
            return value in typing.get_args(kind), value
        if origin is tuple:
            if not isinstance(value, list):
                return False, None
            own, *more = typing.get_args(kind)
            kinds = [own] * len(value) if more in ([], [...]) else [own, *more]
            if len(kinds) != len(value):
                return False, None
            return True, tuple(
                self._value(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(kinds, value, strict=True))
            )
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                return False, None
            _, own = typing.get_args(kind)
            return True, {name: self._value(own, part, f"{where}.{name}") for name, part in value.items()}
        if kind in (str, Path):
            value = node.text if node.text is not None and value is not None else value
            return isinstance(value, str), kind(value) if isinstance(value, str) else None
        if kind is float and (node.text or "") != "" and isinstance(value, str) and _NUMBER.fullmatch(node.text or ""):
            return True, float(value)  # YAML 1.1 reads 1e-3 as text
        if kind is float and type(value) is int:
            return (True, float(value)) if abs(value) <= sys.float_info.max else (False, None)
        return kind in (int, float, bool) and type(value) is kind, value

    def _fields(self, node: Node, where: str, known: Sequence[str]) -> Mapping[str, Node]:
        if not isinstance(node.value, Mapping):
            subject = where or "the config"
            raise self._error(node, f"{subject} is {_shown(node.value)}; it must be a mapping of {', '.join(known)}")
        for name, own in node.value.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise self._error(own, f"there is no field {f'{where}.' if where else ''}{name}; {hint}")
        return node.value

    def _word(self, node: Node, where: str, name: str) -> str | None:
        """Returns the text of a field, before the other fields are known; None if it is missing."""
        if not isinstance(node.value, Mapping) or name not in node.value:
            return None
        return self._value(str | None, node.value[name], f"{where}.{name}")

    def _error(self, node: Node, message: str) -> ConfigError:
        return ConfigError(f"{self._path}{'' if node.line is None else f', line {node.line}'}: {message}")

    @contextlib.contextmanager
    def _located(self, node: Node) -> Iterator[None]:
        """Puts the file and the line before what a dataclass says about its fields."""
        try:
            yield
        except ConfigError as error:
            raise self._error(node, str(error)) from error


def _plain(hint: Any) -> Any:
    """Returns a type without annotations."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _name(kind: Any) -> str:
    """Returns the name of a type in messages."""
    kind = _plain(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if origin is tuple:
        return "a list"
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    return _NAMES.get(kind, "null")


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else json.dumps(value)[:80]
