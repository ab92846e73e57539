"""Command-line syntax of strings, lists of strings and class=text pairs."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import tyro


def unescape(text: str) -> str:
    """Replaces `\\n` by a newline, `\\t` by a tab and `\\\\` by a backslash; other backslashes stay as they are."""
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    out, i = "", 0
    while i < len(text):
        pair = text[i : i + 2]
        if pair[0] == "\\" and pair[1:] in escapes:
            out, i = out + escapes[pair[1]], i + 2
        else:
            out, i = out + text[i], i + 1
    return out


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _read_pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is not of the form class=text")
        if key in pairs:
            raise ValueError(f"class {key!r} is given twice")
        pairs[key] = unescape(value)
    return pairs


def _spec(
    metavar: str, nargs: Any, read: Callable[[list[str]], Any], write: Callable[[Any], list[str]], kind: type
) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=write,
    )


# A flag's value is a single line, so a newline is written as `\n`.
Line = Annotated[str, _spec("TEXT", 1, lambda words: unescape(words[0]), lambda text: [_escape(text)], str)]
Lines = Annotated[
    tuple[str, ...],
    _spec("TEXT...", "*", lambda words: tuple(map(unescape, words)), lambda texts: list(map(_escape, texts)), tuple),
]
Pairs = Annotated[
    Mapping[str, str],
    _spec("CLASS=TEXT...", "*", _read_pairs, lambda pairs: [f"{k}={_escape(v)}" for k, v in pairs.items()], Mapping),
]
