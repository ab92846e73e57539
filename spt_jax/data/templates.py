"""Templates: two strings that say how a record reads, and where the virtual tokens stand.

A template is a prompt and a target. `{field}` is a field of the record, `<soft>` stands for all virtual tokens,
`<soft:5>` for the next five, `<bos>` for the tokenizer's BOS (first by default, if the tokenizer adds one), `{{` and
`}}` for braces. Virtual token i has the id `vocab_size + i`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from spt_jax.errors import ConfigError, did_you_mean

MESSAGES = "messages"


@dataclasses.dataclass(frozen=True)
class Text:
    """Literal text, in which the tokenizer's control tokens count as such."""

    text: str


@dataclasses.dataclass(frozen=True)
class Plain:
    """Literal text in which nothing counts as a control token."""

    text: str


@dataclasses.dataclass(frozen=True)
class Field:
    """A record's field, always plain text."""

    name: str


@dataclasses.dataclass(frozen=True)
class Virtual:
    """The next `count` virtual tokens; None for all of them."""

    count: int | None


@dataclasses.dataclass(frozen=True)
class Bos:
    """The tokenizer's BOS."""


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token that a chat template writes. Text after it is encoded as the tokenizer itself does there."""

    id: int


@dataclasses.dataclass(frozen=True)
class Read:
    """The part of a chat that a head reads: a field without the `skipped` blanks that it begins with."""

    text: str
    skipped: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where text is cut: what stands before is encoded without regard to what follows."""


Piece = Text | Plain | Field | Virtual | Bos | Control | Read | Cut
_MARKUP = re.compile(r"<soft(?::(?P<count>\d+))?>|(?P<bos><bos>)|(?P<brace>\{\{|\}\})|\{(?P<field>\w+)\}|(?P<bad>[{}])")


def parse(template: str) -> list[Piece]:
    """The pieces of one side of a template, in order.

    Raises:
      ConfigError: a brace that is neither doubled nor around a field name, or `<soft:0>`.
    """
    pieces: list[Piece] = []
    text, last = "", 0
    for match in _MARKUP.finditer(template):
        text += template[last : match.start()]
        last = match.end()
        if match["bad"]:
            raise ConfigError(
                f"template {template!r}: lone {match['bad']!r} at character {match.start()}; write it twice"
            )
        if match["brace"]:
            text += match["brace"][0]
            continue
        pieces += [Text(text)] if text else []
        text = ""
        if match["field"]:
            pieces.append(Field(match["field"]))
        elif match["bos"]:
            pieces.append(Bos())
        elif match["count"] is not None and int(match["count"]) == 0:
            raise ConfigError(f"template {template!r}: <soft:0> places no virtual token")
        else:
            pieces.append(Virtual(int(match["count"]) if match["count"] else None))
    text += template[last:]
    return pieces + ([Text(text)] if text else [])


def virtual_length(template: str) -> int | None:
    """The sum of a template's `<soft:n>`; None if it has none.

    Raises:
      ConfigError: a bare `<soft>` twice, or beside `<soft:n>`.
    """
    counts = [piece.count for piece in parse(template) if isinstance(piece, Virtual)]
    if None in counts and len(counts) > 1:
        raise ConfigError(
            f"template {template!r}: <soft> stands for all virtual tokens, so it can stand there only once"
        )
    numbers = [count for count in counts if count is not None]
    return sum(numbers) if numbers else None


def without_virtual(template: str) -> str:
    """The same template for the bare model."""
    return re.sub(r"<soft(:\d+)?>", "", template)


HeadKind = Literal["language_model", "classification", "tagging", "span"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How records become prompts and targets.

    prompt, target: the two sides. A prompt that holds `{messages}` takes a chat from the record's `messages`, whose
      assistant turns are the targets; `target` is then empty.
    virtual_tokens: how many there are, P.
    verbalizers: class -> text, for classification; the target's one field is then the label.
    truncate: the field that may be shortened when an example is too long; None refuses such examples.
    keep: which end of that field stays.
    task: the field that names a record's task, where every task has a prompt of its own.
    tasks: the tasks, in the order of their prompts.
    head: what a head of the soft prompt's own reads: classification the class off the prompt's last token, tagging a
      class off every word of a field, span the start and the end of a part of a field. The verbalizers then only name
      the classes, in the head's order. The target's one field holds the class, the tags or the answer.
    reads: the prompt's field that a tagging or span head reads.
    chat: render prompt and target as a user's and an assistant's turn through the tokenizer's chat template.
    system: the system turn of a chat.
    """

    prompt: str
    target: str = ""
    virtual_tokens: int = 0
    verbalizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    truncate: str | None = None
    keep: Literal["start", "end"] = "start"
    task: str | None = None
    tasks: tuple[str, ...] = ()
    head: HeadKind = "language_model"
    reads: str | None = None
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        placed = virtual_length(self.prompt)
        if placed is not None and placed != self.virtual_tokens:
            raise ConfigError(
                f"template {self.prompt!r} places {placed} virtual tokens, the soft prompt has {self.virtual_tokens}"
            )
        if self.virtual_tokens and placed is None and "<soft>" not in self.prompt:
            raise ConfigError(f"template {self.prompt!r} has no <soft>: say where the virtual tokens go")
        if any(isinstance(piece, Virtual) for piece in parse(self.target)):
            raise ConfigError(f"target {self.target!r}: virtual tokens belong to the prompt")
        if self.verbalizers and self.label_field is None:
            raise ConfigError(
                f"target {self.target!r}: with verbalizers, the target holds exactly one field, the label"
            )
        if self.head == "classification" and len(self.verbalizers) < 2:
            raise ConfigError("a classification head needs verbalizers, whose names are the classes: at least 2")
        if (self.reads is not None) != (self.head in ("tagging", "span")):
            raise ConfigError(
                "data.reads names what a tagging or span head reads: it goes with such a head, and only so"
            )
        if self.reads is not None:
            if self.reads not in self.prompt_fields:
                raise ConfigError(
                    f"data.reads={self.reads!r} is no prompt field; {did_you_mean(self.reads, self.prompt_fields)}"
                )
            if self.label_field is None:
                raise ConfigError(f"target {self.target!r}: a {self.head} head needs exactly one field there")
            if self.truncate is not None:
                raise ConfigError(
                    f"data.truncate might cut off what a {self.head} head is asked for; split such records"
                )
        if self.truncate == MESSAGES:
            raise ConfigError("data.truncate cannot shorten a chat: leave turns out of the long records")
        if self.truncate is not None and self.truncate not in self.prompt_fields:
            raise ConfigError(
                f"truncate={self.truncate!r} is no prompt field; {did_you_mean(self.truncate, self.prompt_fields)}"
            )
        if not self.target and not self.is_conversation:
            raise ConfigError('an empty target: name what the model shall learn to say, for example "{label}"')

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the prompt, then of the target, each once."""
        pieces = parse(self.prompt) + parse(self.target)
        return tuple(dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Field)))

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """Fields of the prompt, each once."""
        return tuple(dict.fromkeys(piece.name for piece in parse(self.prompt) if isinstance(piece, Field)))

    @property
    def label_field(self) -> str | None:
        names = [piece.name for piece in parse(self.target) if isinstance(piece, Field)]
        return names[0] if len(names) == 1 else None

    @property
    def is_conversation(self) -> bool:
        return Field(MESSAGES) in parse(self.prompt)

    def bare(self, prompt: str | None = None) -> "Template":
        """The same task without a soft prompt, asked by `prompt` or by this template's own words."""
        prompt = without_virtual(self.prompt if prompt is None else prompt)
        truncate = self.truncate if Field(self.truncate or "") in parse(prompt) else None
        changes: dict[str, Any] = {"task": None, "tasks": (), "head": "language_model", "reads": None}
        return dataclasses.replace(self, prompt=prompt, virtual_tokens=0, truncate=truncate, **changes)
