"""What a tokenizer's chat template puts around the turns of a chat."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spt_jax.data.templates import MESSAGES, Bos
from spt_jax.errors import ConfigError, DataError


class ChatTemplate:
    """A tokenizer's chat template, rendered with marks in place of the contents.

    What stands between the marks is literal text, so that contents can be pieces of our own.
    """

    def __init__(self, tokenizer: Any, special: re.Pattern[str] | None):
        self._tokenizer = tokenizer
        self._special = special

    def rendered(self, roles: Sequence[str], add_generation_prompt: bool) -> list[str]:
        """Literal texts around the contents of the turns: len(roles) + 1 of them.

        Raises:
          ConfigError: the template refuses the roles, or does not show every turn once and in order.
        """
        messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja raises what the template says
            raise ConfigError(f"the tokenizer's chat template refuses the roles {list(roles)}: {error}") from error
        parts = re.split("\ue000(\\d+)\ue001", text)
        if parts[1::2] != [str(i) for i in range(len(roles))]:
            raise ConfigError(
                f"the tokenizer's chat template does not show the turns {list(roles)} once each, in order"
            )
        return parts[::2]

    def without_bos(self, text: str) -> tuple[list[Bos], str]:
        """Splits the BOS, if the template writes it, from the rest."""
        bos = self._tokenizer.bos_token
        return ([Bos()], text[len(bos) :]) if bos and text.startswith(bos) else ([], text)

    def turn_end(self, text: str) -> tuple[list[int], str]:
        """Splits what follows an assistant's words into the control token that ends the turn and the rest."""
        match = self._special.match(text.lstrip()) if self._special else None
        if match is None:
            return [], text
        return [self._tokenizer.convert_tokens_to_ids(match[0])], text.lstrip()[match.end() :]


def messages_of(record: Mapping[str, Any], index: int) -> list[Mapping[str, Any]]:
    """The turns of a record.

    Raises:
      DataError: they are no list of mappings with "role" and "content".
    """
    messages = record.get(MESSAGES)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"record {index + 1}: {MESSAGES!r} must be a list of turns with 'role' and 'content'")
    for turn in messages:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(
                f"record {index + 1}: every turn of {MESSAGES!r} needs 'role' and 'content'; this one is {turn!r}"
            )
    return list(messages)
