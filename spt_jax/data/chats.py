"""Chats rendered by a tokenizer's chat template and split into pieces.

The template renders the real contents, so its filters and conditions apply to them. Three things that are not ordinary
text are marked in the contents with Unicode noncharacters: virtual tokens, the two ends of a content, and names of
control tokens that are part of a content's text.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.rendering import render_chat
from spt_jax.data.templates import MESSAGES, Control, Piece, Plain, Text
from spt_jax.data.tokenization import ControlTokens
from spt_jax.data.values import is_list, text_of
from spt_jax.errors import ConfigError, DataError

_BREAK = "\ufdd0"  # splits the name of a control token that is part of a content's text
_SLOT = re.compile("\ufdd1(\\d+)\ufdd2")
_MARKS = re.compile("[\ufdd0-\ufdd2]")

# Keys of messages that the template would have to render, and that this library does not support.
_CALLS = ("tool_calls", "function_call", "tools", "documents")

Spans = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of a chat.

    Attributes:
      role: the role, as named in the template.
      content: the pieces of the content. The template sees a marker in place of each piece other than `Text` and
        `Plain`.
      more: other texts that the template may read, such as `reasoning_content`.
      opened, closed: whether the beginning and the end of the content, without surrounding whitespace, are marked in
        the rendering.
    """

    role: str
    content: Sequence[Piece]
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)
    opened: bool = False
    closed: bool = False

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"

    @property
    def is_blank(self) -> bool:
        return all(isinstance(piece, Text | Plain) and not piece.text.strip() for piece in self.content)


@dataclasses.dataclass(frozen=True)
class Edge:
    """Where the content of turn number `turn` begins or ends in the rendering, without surrounding whitespace."""

    turn: int


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A rendered chat.

    Attributes:
      text: the text, with numbered slots.
      slots: what each slot stands for.
      spans: the character spans (start, end) of the template's `{% generation %}` blocks.
    """

    text: str
    slots: Sequence[Piece | Edge]
    spans: Spans

    def edges(self, turn: int) -> list[tuple[int, int]]:
        """Returns the character spans (start, end) of the slots that mark the edges of a turn's content."""
        numbers = [str(i) for i, slot in enumerate(self.slots) if slot == Edge(turn)]
        return [match.span() for match in _SLOT.finditer(self.text) if match[1] in numbers]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What follows a generation prompt.

    Attributes:
      words: the pieces of the answer.
      end: the token that ends it, if the template writes one.
    """

    words: list[Piece]
    end: list[Piece]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a chat, and whether the model learns to predict it."""

    pieces: list[Piece]
    predicted: bool


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._controls = ControlTokens(tokenizer)

    def prompt(self, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the pieces of a chat up to where the next answer begins.

        Raises:
          ConfigError: the template rejects the turns, or does not render each of them once and in order.
          DataError: a content contains one of the noncharacters that are used as markers.
        """
        rendering = self._rendered(turns, True)
        return self._pieces(rendering, 0, len(rendering.text))

    def answer(self, turns: Sequence[Turn], content: Sequence[Piece]) -> Answer:
        """Renders an assistant's content as the answer that follows the generation prompt of these turns.

        Whitespace between the two belongs to the answer: a template may end the prompt in `[/INST]` and write ` yes`.
        Other text that the template puts there is left out: an answer follows the generation prompt directly.

        Raises:
          ConfigError, DataError: see `prompt`.
        """
        rendering = self._rendered([*turns, Turn("assistant", content, opened=True, closed=True)], False)
        front = self._rendered(turns, True).text
        (opening, begin), (close, closed) = rendering.edges(len(turns))
        before, words = rendering.text[:opening], self._marked(content, [])
        lead = before[len(front) :] if before.startswith(front) else None
        if lead is None or lead.strip():
            space = words[: len(words) - len(words.lstrip())]
            lead = space if before.endswith(space) else ""
        lead = lead[self._controls.swallowed(front + lead, len(front)) :]
        found = self._controls.end(rendering.text, closed)
        end = [] if found is None else self._pieces(rendering, closed, found[0])
        return Answer([*([Plain(lead)] if lead else []), *self._pieces(rendering, begin, close)], end)

    def conversation(self, turns: Sequence[Turn], eos: Sequence[int]) -> list[Segment]:
        """Splits a whole chat into segments: the assistant turns, which are predicted, and everything else.

        An assistant turn is everything after its generation prompt. If the template has `{% generation %}` blocks, only
        their contents are predicted. If the template writes no token that ends the last answer, EOS ends it.

        Args:
          turns: the turns of the chat.
          eos: the ids of EOS; empty if there is none.

        Raises:
          ConfigError: see `prompt`; or the text before an answer differs from its generation prompt.
          DataError: see `prompt`.
        """
        marked = [dataclasses.replace(turn, closed=turn.is_answer or not turn.is_blank) for turn in turns]
        rendering, plain = self._rendered(marked, False), _SLOT.sub("", self._rendered(turns, False).text)
        if _SLOT.sub("", rendering.text) != plain:
            raise ConfigError(
                f"the chat template depends on the last characters of a turn: {_difference(rendering.text, plain)}"
            )
        text, targets, ended = rendering.text, [], True
        for number, turn in enumerate(marked):
            if not turn.is_answer:
                continue
            front = self._rendered(marked[:number], True).text
            if not text.startswith(front):
                raise ConfigError(
                    f"before the answer of turn {number + 1}, the chat template writes other text in the whole chat"
                    f" than in the prompt for that answer: {_difference(text, front)}"
                )
            ((_, closed),) = rendering.edges(number)
            end = self._controls.end(text, closed)
            ended = end is not None
            targets.append((len(front) + self._controls.swallowed(text, len(front)), end[0] if end else closed))
        segments, last = [], 0
        for begin, stop in _within_blocks(targets, rendering.spans) if rendering.spans else targets:
            segments.append(Segment(self._pieces(rendering, last, begin), predicted=False))
            segments.append(Segment(self._pieces(rendering, begin, stop), predicted=True))
            last = stop
        if turns[-1].is_answer and not ended and not rendering.spans:
            answer = [*segments[-1].pieces, *(Control(id_) for id_ in eos)]
            return [*segments[:-1], Segment(answer, predicted=True)]
        return [*segments, Segment(self._pieces(rendering, last, len(text)), predicted=False)]

    def turn_ends(self, before: Sequence[Turn]) -> list[int]:
        """Returns the ids that end an assistant turn: the last turn of a chat, or one before a user turn.

        Args:
          before: the turns before the assistant turn; if empty, a user turn is made up.
        """
        front = list(before) or [Turn("user", [Plain("a")])]
        turns = [*front, Turn("assistant", [Plain("b")], closed=True), Turn("user", [Plain("c")])]
        found: list[int] = []
        for some in (turns[:-1], turns):
            try:
                rendering = self._rendered(some, False)
            except ConfigError:  # the template needs other turns, such as a system turn at the beginning
                continue
            ((_, closed),) = rendering.edges(len(front))
            end = self._controls.end(rendering.text, closed)
            found += [end[1]] if end else []
        return found

    def _rendered(self, turns: Sequence[Turn], generation_prompt: bool) -> Rendering:
        slots: list[Piece | Edge] = []
        messages = []
        for number, turn in enumerate(turns):
            more = {name: self._marked([Plain(text)], slots) for name, text in turn.more.items()}
            slots += [Edge(number)] if turn.opened else []
            opening = _slot(len(slots) - 1) if turn.opened else ""
            content = self._marked(turn.content, slots)
            slots += [Edge(number)] if turn.closed else []
            closing = _slot(len(slots) - 1) if turn.closed else ""
            words = content.strip()
            at = content.find(words)
            content = content[:at] + opening + words + closing + content[at + len(words) :]
            role = self._marked([Plain(turn.role)], slots)
            messages.append({**more, "role": role, "content": content})
        roles = [turn.role for turn in turns]
        try:
            text, spans = render_chat(self._tokenizer, messages, add_generation_prompt=generation_prompt)
        except ConfigError as error:
            raise ConfigError(f"{error} (a chat of the roles {', '.join(roles)})") from error
        if [int(match[1]) for match in _SLOT.finditer(text)] != list(range(len(slots))):
            raise ConfigError(f"the tokenizer's chat template does not render each of the turns {roles} once, in order")
        return Rendering(text, slots, spans)

    def _marked(self, content: Sequence[Piece], slots: list[Piece | Edge]) -> str:
        """Returns a content as the template receives it, and appends pieces that are not text to `slots`."""
        text = ""
        for piece in content:
            if isinstance(piece, Text | Plain) and _MARKS.search(piece.text):
                raise DataError("a chat cannot contain the noncharacters U+FDD0 to U+FDD2")
            if isinstance(piece, Text):
                text += piece.text
            elif isinstance(piece, Plain):
                text += self._controls.pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], piece.text)
            else:
                text += _slot(len(slots))
                slots.append(piece)
        return text

    def _pieces(self, rendering: Rendering, begin: int, stop: int) -> list[Piece]:
        """Returns the pieces of a rendering between two characters."""
        pieces: list[Piece] = []
        for number, part in enumerate(_SLOT.split(rendering.text[begin:stop])):
            if number % 2:
                slot = rendering.slots[int(part)]
                pieces += [] if isinstance(slot, Edge) else [slot]
                continue
            for token in self._controls.split(part):
                pieces.append(Plain(token.replace(_BREAK, "")) if isinstance(token, str) else Control(token))
        return pieces


def _slot(number: int) -> str:
    return f"\ufdd1{number}\ufdd2"


def _within_blocks(targets: Sequence[tuple[int, int]], blocks: Spans) -> list[tuple[int, int]]:
    """Returns the parts of the generation blocks that come after the latest generation prompt."""
    newest = [max((begin for begin, _ in targets if begin < last), default=last) for _, last in blocks]
    parts = [(max(first, begin), last) for (first, last), begin in zip(blocks, newest, strict=True)]
    return [(first, last) for first, last in parts if first < last]


def _difference(one: str, other: str) -> str:
    """Shows the first place where two renderings differ."""
    one, other = (_MARKS.sub("", _SLOT.sub("", text)) for text in (one, other))
    at = next((i for i in range(len(one)) if one[: i + 1] != other[: i + 1]), len(one))
    return f"{one[max(at - 30, 0) : at + 30]!r} and {other[max(at - 30, 0) : at + 30]!r}"


def turns_of(record: Mapping[str, Any], index: int) -> list[Turn]:
    """Returns the turns of a record's chat.

    Args:
      record: the record.
      index: its number from 0, for error messages.

    Raises:
      DataError: the chat is not a list of mappings with "role" and "content", a content is not text, or a turn calls
        tools.
    """
    messages = record.get(MESSAGES)
    if not is_list(messages) or len(messages) == 0:
        raise DataError(f"record {index + 1}: {MESSAGES!r} must be a list of turns with 'role' and 'content'")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(
                f"record {index + 1}: every turn of {MESSAGES!r} needs 'role' and 'content'; this one is {message!r}"
            )
        where = f"turn {number}"
        calls = next((name for name in _CALLS if message.get(name)), None)
        if message["content"] is None:
            raise DataError(f"record {index + 1}: the content of {where} is null (tool calls are not supported)")
        if calls is not None:
            raise DataError(f"record {index + 1}: {where} has {calls!r}, but tool calls are not supported")
        role, content = (
            text_of(message[name], f"record {index + 1}: the {name} of {where}") for name in ("role", "content")
        )
        more = {k: v for k, v in message.items() if isinstance(v, str) and k not in ("role", "content", "type")}
        turns.append(Turn(role, [Plain(content)], more))
    return turns


def turns_after(held: Sequence[Turn], record: Mapping[str, Any], index: int) -> list[Turn]:
    """Returns the turns of a record's chat after those that its template holds.

    Args:
      held: the turns of the template: a system turn, or none.
      record: the record.
      index: its number from 0, for error messages.

    Raises:
      DataError: see `turns_of`; or there is a second system turn.
    """
    turns = turns_of(record, index)
    if held and any(turn.role in ("system", "developer") for turn in turns):
        raise DataError(
            f"record {index + 1}: the chat has a system turn, and the prompt holds one already; leave it out"
        )
    return [*held, *turns]
