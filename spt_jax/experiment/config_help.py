"""The options of a command that starts from a config: --help after the config. It imports neither JAX nor the config.

The text is made from the source of the dataclasses and of the config, because importing the modules of all methods
takes seconds.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from spt_jax.experiment import declared
from spt_jax.experiment.declared import Declaration, Field
from spt_jax.experiment.declared_settings import plain, read_settings
from spt_jax.experiment.shipped import config_path, config_summary
from spt_jax.experiment.usage import last_value, method_summaries

WIDTH = 80
_INDENT = " " * 8
# Fields of objectives that follow from the data.
_COUNTED = frozenset({"choices"})


def config_help(module: str, job: str, words: Sequence[str], program: str) -> str | None:
    """Returns the help of a command after a config.

    Args:
      module: the module of the command.
      job: the name in it of the dataclass with the command's own options.
      words: the config and the words after it; those for --method.name and --loss.over choose whose options are shown.
      program: the command, as it is typed.

    Returns:
      The text; None if the sources do not contain it, as with a method that is defined in the config, or a name that
      does not exist.

    Raises:
      ConfigError: no config of this name ships with the package.
    """
    path = config_path(words[0])
    methods = declared.table("spt_jax.prompts", "METHODS")
    objectives = declared.table("spt_jax.training.objectives", "OBJECTIVES")
    settings = read_settings(path, methods, objectives)
    if settings is None:
        return None
    method = last_value(words, "--method.name") or settings.method
    over = last_value(words, "--loss.over") or settings.objective or "None"
    if method not in methods or over not in {*objectives, "None"}:
        return None
    given = settings.fields
    if method != settings.method:
        given = {name: own for name, own in given.items() if name != methods[settings.method].name}
    lines = [
        f"usage: {program} {words[0]} [--field value ...]",
        "",
        *textwrap.wrap(config_summary(path) if path.suffix == ".py" else "", WIDTH),
        f"{path.name}, whose values are shown beside the defaults, is",
        str(path),
    ]
    for group in _groups(declared.declaration(module, job), methods[method], objectives.get(over)):
        lines += ["", *textwrap.wrap(group.title, WIDTH)]
        for field in group.options:
            lines += _option(field, group.prefix, path.name, given.get(group.kind.name, {}).get(field.name))
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that are shown together.

    Attributes:
      title: the line above them.
      prefix: what precedes their names in flags, such as "train.".
      kind: the dataclass that they are fields of.
      options: the options.
    """

    title: str
    prefix: str
    kind: Declaration
    options: Sequence[Field]


def _groups(job: Declaration, method: Declaration, objective: Declaration | None) -> Iterator[Group]:
    own = declared.fields(job)
    yield Group("options:", "", job, _options(own.values()))
    for name, field in declared.fields(declared.declaration("spt_jax.config", "ExperimentConfig")).items():
        kind = method if name == "method" else field.nested
        assert kind is not None
        yield from _group(name, field.help, kind, objective if name == "loss" else None)
    for name, field in own.items():
        if field.nested is not None and name != "config":
            yield from _group(name, field.help, field.nested)


def _group(name: str, text: str, kind: Declaration, objective: Declaration | None = None) -> Iterator[Group]:
    fields = declared.fields(kind)
    yield Group(f"{name}: {text}", f"{name}.", kind, _options(fields.values()))
    if objective is not None:
        own = [field for key, field in declared.fields(objective).items() if key not in {*fields, *_COUNTED}]
        if own:
            yield Group(f"{name}, for this objective:", f"{name}.", objective, own)
    for key, field in fields.items():
        if field.nested is not None:
            yield from _group(f"{name}.{key}", field.help, field.nested)


def _options(fields: Iterable[Field]) -> list[Field]:
    return [field for field in fields if field.nested is None]


def _option(field: Field, prefix: str, config: str, setting: str | None) -> list[str]:
    """Returns the lines of an option."""
    flag, off = (f"--{prefix}{start}{field.name}".replace("_", "-") for start in ("", "no-"))
    known = [] if field.default is None else [f"default: {plain(field.default)}"]
    known += [] if setting is None else [f"{config}: {plain(setting)}"]
    values = [f"({'; '.join(known)})"] if known else []
    if (prefix, field.name) == ("method.", "name"):
        lines = _names(method_summaries())
    else:
        lines = _wrapped(" ".join([field.help, *values]).strip())
    return [f"  {flag}, {off}" if not field.values else f"  {flag} {field.values}", *lines]


def _names(summaries: Mapping[str, str]) -> list[str]:
    lines = [f"{_INDENT}the method, one of:"]
    for name, line in summaries.items():
        lines += _wrapped(f"{name}: {line}", subsequent=_INDENT + "  ")
    return lines


def _wrapped(text: str, subsequent: str = _INDENT) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=_INDENT,
        subsequent_indent=subsequent,
        break_long_words=False,
        break_on_hyphens=False,
    )
