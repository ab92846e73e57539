"""Templates: how a record becomes a prompt and a target, and where the virtual tokens go.

A template has a prompt and a target string. In them, `{field}` stands for a field of the record, `<soft>` for all
virtual tokens, `<soft:5>` for the next five, `<bos>` for the tokenizer's BOS (which goes first by default, if the
tokenizer adds one), and `{{` and `}}` for braces. On a base with an encoder, `<mask>` is the tokenizer's mask token,
and `<sep>` what it puts between two texts (`spt_jax.data.pairs`). On an encoder-decoder, what follows `<decoder>` goes
after the decoder's start token, before the target (`spt_jax.data.both_sides`). Virtual token i has the id
`vocab_size + i`.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from spt_jax.errors import ConfigError, did_you_mean

MESSAGES = "messages"
DECODER = "<decoder>"
TEXT = "language_model"  # the task of templates that name no other


@dataclasses.dataclass(frozen=True)
class Text:
    """Literal text in which the names of the tokenizer's control tokens become control tokens."""

    text: str


@dataclasses.dataclass(frozen=True)
class Plain:
    """Literal text in which nothing becomes a control token."""

    text: str


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the record, encoded as plain text."""

    name: str


@dataclasses.dataclass(frozen=True)
class Virtual:
    """The next `count` virtual tokens, or all of them if None."""

    count: int | None


@dataclasses.dataclass(frozen=True)
class Bos:
    """The tokenizer's BOS."""


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token written by a chat template. Text after it is encoded as the tokenizer itself would."""

    id: int


@dataclasses.dataclass(frozen=True)
class Read:
    """The part of a chat that a head reads: a field without its leading whitespace, of `skipped` characters."""

    text: str
    skipped: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """A boundary: the text before it and the text after it are encoded separately."""


@dataclasses.dataclass(frozen=True)
class Separator:
    """The ids that a tokenizer puts between two texts. The text after them is encoded as one of its own."""

    ids: tuple[int, ...]


Piece = Text | Plain | Field | Virtual | Bos | Control | Read | Cut | Separator
_MARKUP = re.compile(r"<soft(?::(?P<count>\d+))?>|(?P<bos><bos>)|(?P<brace>\{\{|\}\})|\{(?P<field>\w+)\}|(?P<bad>[{}])")


def parse(template: str) -> list[Piece]:
    """Parses a prompt or a target into its pieces, in order.

    Raises:
      ConfigError: there is a `<soft:0>`, or a brace that is neither doubled nor part of a field.
    """
    return [*_parsed(template)]


@functools.lru_cache(maxsize=64)  # a template is parsed several times for each record
def _parsed(template: str) -> tuple[Piece, ...]:
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
    return (*pieces, *([Text(text)] if text else []))


def virtual_length(template: str) -> int | None:
    """Returns the sum over all `<soft:n>` of a template; None if it has none.

    Raises:
      ConfigError: the template has `<soft>` twice, or together with `<soft:n>`.
    """
    counts = [piece.count for piece in parse(template) if isinstance(piece, Virtual)]
    if None in counts and len(counts) > 1:
        raise ConfigError(f"template {template!r}: <soft> stands for all virtual tokens, so it can occur only once")
    numbers = [count for count in counts if count is not None]
    return sum(numbers) if numbers else None


def without_virtual(template: str) -> str:
    """Removes `<soft>` and `<soft:n>` from a template."""
    return re.sub(r"<soft(:\d+)?>", "", template)


class TemplateTask(Protocol):
    """What a template asks of its task.

    Attributes:
      has_head: whether the soft prompt needs a head in place of the base's output matrix.
      judged: whether answers are judged by reward functions, so that there is no target.
    """

    has_head: ClassVar[bool]
    judged: ClassVar[bool]

    def check(self, template: "Template") -> None:
        """Raises a ConfigError if the template lacks what the task needs."""
        ...


# The registered tasks, by name (`spt_jax.data.task.register`).
TEMPLATE_TASKS: dict[str, TemplateTask] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How records become prompts and targets.

    Attributes:
      prompt: the text before the answer, with fields and `<soft>`. A prompt with `{messages}` takes a chat from the
        record's `messages`, and the assistant turns are the targets.
      target: the text of the answer, with fields; empty with `{messages}`.
      rejected: for the preference task, the text of the rejected answer, with fields; the target is the chosen one.
      virtual_tokens: the number of virtual tokens; by default that of `<soft:n>` in the prompt.
      verbalizers: maps each class to its text, for classification; the target's only field is then the label.
      truncate: the field that is shortened if an example is too long; if None, such examples are refused.
      keep: which end of the truncated field is kept.
      task: the field that names a record's task, if each task has its own soft prompt.
      tasks: the tasks, in the order of their soft prompts.
      head: the name of the task, a key of `spt_jax.TASKS`, which is also that of its head. language_model is text or,
        with verbalizers, classification, both without a head. A classification head predicts a class at the last token
        of the prompt, a tagging head a class for each word of a field, and a span head the start and the end of a
        substring of a field. With a head, the verbalizers only name the classes, in the head's order, and the target's
        only field holds the class, the tags or the answer.
      reads: the prompt field that a tagging or span head reads.
      chat: whether to render prompt and target as a user and an assistant turn with the tokenizer's chat template.
      system: the system turn of such a chat.
      new_tokens: tokens that the vocabulary lacks, by name. Where the prompt names one, it has the id `vocab_size +
        virtual_tokens + i`, for the i-th of them; in records, the names are plain text.
      continues: whether the prefix of the soft prompt holds text that the prompt continues, such as one that
        `spt_jax.remember` encoded: there is no BOS and no dummy space before it. The prefix of a chat ends inside its
        system turn, and `system` is the rest of that turn, for {messages} too.
      per_input: whether the virtual tokens depend on the input of each record, as in the method `lopa`.
    """

    prompt: str
    target: str = ""
    rejected: str = ""
    virtual_tokens: int = 0
    verbalizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    truncate: str | None = None
    keep: Literal["start", "end"] = "start"
    task: str | None = None
    tasks: tuple[str, ...] = ()
    head: str = TEXT
    reads: str | None = None
    chat: bool = False
    system: str | None = None
    continues: bool = False
    new_tokens: tuple[str, ...] = ()
    per_input: bool = False

    def __post_init__(self) -> None:
        placed = virtual_length(self.prompt)
        if placed is not None and not self.virtual_tokens:
            object.__setattr__(self, "virtual_tokens", placed)
        if placed is not None and placed != self.virtual_tokens:
            raise ConfigError(
                f"template {self.prompt!r} places {placed} virtual tokens, the soft prompt has {self.virtual_tokens}"
            )
        if self.virtual_tokens and placed is None and "<soft>" not in self.prompt:
            raise ConfigError(f"template {self.prompt!r} has no <soft>; put it where the virtual tokens go")
        for name, text in (("target", self.target), ("rejected", self.rejected)):
            if any(isinstance(piece, Virtual) for piece in parse(text)):
                raise ConfigError(f"{name} {text!r}: virtual tokens belong to the prompt")
        self._check_new_tokens()
        if self.verbalizers and self.label_field is None:
            raise ConfigError(
                f"target {self.target!r}: with verbalizers, the target needs exactly one field, the label"
            )
        if self.head not in TEMPLATE_TASKS:
            raise ConfigError(f"template.head is {self.head!r}; {did_you_mean(self.head, TEMPLATE_TASKS)}")
        TEMPLATE_TASKS[self.head].check(self)
        if self.truncate == MESSAGES:
            raise ConfigError("data.truncate cannot shorten a chat: remove turns from long records")
        if self.truncate is not None and self.truncate not in self.prompt_fields:
            raise ConfigError(
                f"truncate={self.truncate!r} is not a prompt field; {did_you_mean(self.truncate, self.prompt_fields)}"
            )
        if self.continues and (self.chat or self.is_conversation) and self.system is None:
            raise ConfigError(
                "continues is set for a chat without system, the rest of the system turn that it continues"
            )
        if not self.target and not self.is_conversation and not TEMPLATE_TASKS[self.head].judged:
            raise ConfigError('the target is empty: set what the model should learn to generate, such as "{label}"')

    def _check_new_tokens(self) -> None:
        if self.new_tokens and (self.chat or self.is_conversation):
            raise ConfigError("new tokens are names in the prompt's own text, which a chat template would change")
        for name in self.new_tokens:
            if not name.strip() or _MARKUP.search(name):
                raise ConfigError(
                    f"the new token {name!r:.200} must have text other than blanks, and no {{, }} or <soft>"
                )
            if name in self.target or name in self.rejected:
                raise ConfigError(f"target {self.target!r}: the base cannot generate the new token {name!r}")
            if name not in self.prompt:
                raise ConfigError(
                    f"template {self.prompt!r} does not have the new token {name!r}; put it in the prompt"
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the prompt, then those of the target and of the rejected answer, without repetitions."""
        pieces = parse(self.prompt) + parse(self.target) + parse(self.rejected)
        return tuple(dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Field)))

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The fields of the prompt, without repetitions."""
        return tuple(dict.fromkeys(piece.name for piece in parse(self.prompt) if isinstance(piece, Field)))

    @property
    def label_field(self) -> str | None:
        """The only field of the target; None if it has none or several."""
        names = [piece.name for piece in parse(self.target) if isinstance(piece, Field)]
        return names[0] if len(names) == 1 else None

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt inserts whole conversations, {messages}."""
        return Field(MESSAGES) in parse(self.prompt)

    def bare(self, prompt: str | None = None) -> "Template":
        """Returns the template without virtual and new tokens and head, with `prompt` in place of its own if given.

        Without its head, the task is text or classification by verbalizers. Without its prefix, it continues nothing.

        Args:
          prompt: the text in place of the template's prompt; default the prompt without `<soft>`.
        """
        prompt = without_virtual(self.prompt if prompt is None else prompt)
        truncate = self.truncate if Field(self.truncate or "") in parse(prompt) else None
        changes: dict[str, Any] = {"task": None, "tasks": (), "new_tokens": (), "per_input": False}
        if TEMPLATE_TASKS[self.head].has_head:
            changes |= {"head": TEXT, "reads": None}
        if self.continues:
            changes |= {"continues": False, "system": None}
        return dataclasses.replace(self, prompt=prompt, virtual_tokens=0, truncate=truncate, **changes)
