"""The values of a YAML or JSON file, with their lines."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spt_jax.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 2**20

# YAML 1.1 also reads 010 as 8 and 1:30 as 90.
_INTEGER = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)")
_FLOAT = re.compile(r"[^:]*")
_YAML = "tag:yaml.org,2002:"
_KINDS = ("map", "seq", "str", "null", "bool", "int", "float", "timestamp", "value", "merge")


@dataclasses.dataclass(frozen=True)
class Node:
    """A value of a file.

    Attributes:
      value: a mapping, a list, text, a number, true, false or null.
      line: its line in the file, from 1; None if it is not known.
      text: for an unquoted value of YAML, what the file has there, so that `no` and `1e-3` can be read as text.
    """

    value: "Mapping[str, Node] | Sequence[Node] | str | int | float | bool | None"
    line: int | None = None
    text: str | None = None


def read_nodes(path: Path) -> Node:
    """Returns the content of a file.

    Args:
      path: the file, whose name ends in .yaml, .yml or .json.

    Raises:
      ConfigError: the file cannot be parsed, is too long, has a repeated field or what YAML files of configs do not
        support; the message names the line.
    """
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(content)} bytes; a config has at most {MAX_BYTES}")
    try:
        text = content.decode("utf-8-sig")
        return _json_node(path, text) if path.suffix == ".json" else _yaml_node(path, text)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a config: {type(error).__name__}: {str(error)[:200]}") from error


def _json_node(path: Path, text: str) -> Node:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: the field {name!r} is given twice")
        return dict(pairs)

    def node(value: Any) -> Node:
        if isinstance(value, dict):
            return Node({name: node(own) for name, own in value.items()})
        return Node([node(own) for own in value] if isinstance(value, list) else value)

    try:
        return node(json.loads(text, object_pairs_hook=mapping))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except ValueError as error:  # such as an integer of thousands of digits
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a config: {str(error)[:200]}") from error


def _yaml_node(path: Path, text: str) -> Node:
    def place(mark: yaml.Mark | None) -> str:
        return str(path) if mark is None else f"{path}, line {mark.line + 1}"

    def node(found: yaml.Node) -> Node:
        line, kind = found.start_mark.line + 1, found.tag.removeprefix(_YAML)
        if kind not in _KINDS:
            raise ConfigError(f"{place(found.start_mark)}: the tag {found.tag!r} is not supported")
        if isinstance(found, yaml.MappingNode):
            values: dict[str, Node] = {}
            for key, own in found.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{place(key.start_mark)}: a field's name must be text")
                if key.value in values:
                    raise ConfigError(f"{place(key.start_mark)}: the field {key.value!r} is given twice")
                values[key.value] = dataclasses.replace(node(own), line=key.start_mark.line + 1)
            return Node(values, line)
        if isinstance(found, yaml.SequenceNode):
            return Node([node(own) for own in found.value], line)
        plain = found.value if isinstance(found, yaml.ScalarNode) and found.style is None else None
        written = {"null": None, "bool": None, "int": _INTEGER, "float": _FLOAT}
        if kind in written and plain is not None and (written[kind] is None or written[kind].fullmatch(plain)):
            return Node(loader.construct_object(found), line, plain)
        return Node(found.value, line, plain)

    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a control character
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{place(event.start_mark)}: aliases (*{event.anchor}) are not supported")
        root = loader.get_single_node()
        return Node({}) if root is None else node(root)
    except yaml.MarkedYAMLError as error:
        where = place(error.problem_mark or error.context_mark)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, LookupError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
