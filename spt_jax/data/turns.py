"""The turns of a template that is rendered as a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.chats import Turn
from spt_jax.data.shots import solved
from spt_jax.data.templates import Bos, Control, Cut, Field, Piece, Plain, Read, Template, Text, parse


def template_turns(
    template: Template, shots: Sequence[Mapping[str, Any]], fields: Mapping[str, str] | None
) -> list[Turn]:
    """Returns the turns before the answer, with fields filled in if given. In a chat: before {messages}.

    Args:
      template: the template.
      shots: solved records, each a user and an assistant turn.
      fields: the text of each field; None leaves the fields.
    """
    turns = [Turn("system", [Text(template.system)])] if template.system is not None else []
    if template.continues:  # the prefix holds what comes before the cut
        turns = [Turn("system", [Cut(), Plain(template.system or "")])]
    if template.is_conversation:
        return turns if template.continues else []
    for record in shots:
        turns.append(Turn("user", solved(template, record, template.prompt)))
        turns.append(Turn("assistant", solved(template, record, template.target)))
    content: list[Piece] = []
    for piece in parse(template.prompt):
        if fields is None or not isinstance(piece, Field):
            content.append(piece)
        elif piece.name == template.reads:
            value, words = fields[piece.name], fields[piece.name].strip()
            skipped = value.find(words)
            content += [Plain(value[:skipped]), Read(words, skipped), Plain(value[skipped + len(words) :])]
        else:
            content.append(Plain(fields[piece.name]))
    return [*turns, Turn("user", content)]


def around_chat(template: Template, bos: int | None, pieces: list[Piece]) -> list[Piece]:
    """Puts the part of the prompt before {messages} before a chat; a BOS that begins the chat goes first.

    Args:
      template: the template.
      bos: the id of the tokenizer's BOS; None for none.
      pieces: the chat.
    """
    before = parse(template.prompt)[:-1]
    if bos is None or pieces[:1] != [Control(bos)]:
        return [*before, *pieces]
    return [*([] if Bos() in before else pieces[:1]), *before, *pieces[1:]]
