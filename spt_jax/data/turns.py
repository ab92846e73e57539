"""The turns of a template that is rendered as a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.chats import Turn
from spt_jax.data.shots import solved
from spt_jax.data.templates import MESSAGES, Bos, Control, Cut, Field, Piece, Plain, Read, Template, Text, parse
from spt_jax.errors import ConfigError


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


def check_turns(template: Template, tokenizer: Tokenizer, shots: Sequence[Mapping[str, Any]], has_head: bool) -> None:
    """Checks that the turns of a template can be rendered, with the solved examples.

    Args:
      template: the template.
      tokenizer: that of the base.
      shots: the solved examples.
      has_head: whether the template's task has a head.

    Raises:
      ConfigError: they cannot.
    """
    if template.chat and template.is_conversation:
        raise ConfigError("data.chat renders a prompt and a target as a chat, but {messages} already is one")
    if (template.chat or template.is_conversation) and not tokenizer.chat_template:
        raise ConfigError("this base's tokenizer has no chat template")
    if shots and (template.is_conversation or template.virtual_tokens or has_head):
        raise ConfigError("solved examples need a written prompt, without virtual tokens, {messages} or a head")
    if template.is_conversation and parse(template.prompt)[-1] != Field(MESSAGES):
        raise ConfigError("{messages} must come last in a prompt: the answer follows the chat directly")


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
