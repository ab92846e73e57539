"""What the encoder and what the decoder of an encoder-decoder reads of a prompt."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from spt_jax.data.pairs import SEPARATOR
from spt_jax.data.templates import DECODER, Bos, Field, Piece, Separator, Template, Text, parse
from spt_jax.errors import ConfigError


def check_decoder_input(template: Template, start_name: str | None) -> None:
    """Checks what a template puts after `<decoder>`.

    Args:
      template: the template.
      start_name: the name of the token that starts the decoder's tokens; None if the base is no encoder-decoder.

    Raises:
      ConfigError: the base has no encoder and decoder, `<decoder>` occurs twice, or something follows that cannot.
    """
    prompt = template.prompt
    if DECODER not in prompt:
        return
    if start_name is None:
        raise ConfigError(
            f"template {prompt!r}: {DECODER} is for encoder-decoders such as T5, and this base is not one; remove it"
        )
    if prompt.count(DECODER) > 1:
        raise ConfigError(f"template {prompt!r} has several {DECODER}; the input of the decoder begins once")
    front, rest = prompt.split(DECODER)
    if template.reads is not None:
        raise ConfigError(
            f"template {prompt!r}: this head reads hidden states of the encoder, which nothing after {DECODER} changes;"
            " put the virtual tokens before it"
        )
    if all(isinstance(piece, Bos) for piece in parse(front)):
        raise ConfigError(f"template {prompt!r}: there is nothing for the encoder before {DECODER}")
    fields = [piece.name for piece in parse(rest) if isinstance(piece, Field)]
    if fields:
        raise ConfigError(
            f"template {prompt!r}: {{{fields[0]}}} is after {DECODER}, where only virtual tokens and text can be, which"
            " are the same for all records; put it before"
        )
    names = [name for name in ("<bos>", SEPARATOR, start_name) if name in rest]
    if names:
        raise ConfigError(
            f"template {prompt!r}: {names[0]} cannot follow {DECODER}; the decoder's start token precedes what does"
        )


def with_closing(pieces: Sequence[Piece | int], closing: Sequence[int], decodes: bool) -> list[Piece | int]:
    """Returns the pieces of a prompt with the ids that end it: for an encoder-decoder, before what follows `<decoder>`.

    Text after `<decoder>` starts a sequence, as the text of an answer does.

    Args:
      pieces: the pieces.
      closing: the ids that end the prompt; of an encoder-decoder, the last of them starts the decoder's tokens.
      decodes: whether the base is an encoder-decoder.
    """
    for place, piece in enumerate(pieces if decodes else ()):
        if isinstance(piece, Text) and DECODER in piece.text:
            front, rest = piece.text.split(DECODER, 1)
            before, after = ([Text(text)] if text else [] for text in (front, rest))
            return [*pieces[:place], *before, Separator(tuple(closing)), *after, *pieces[place + 1 :]]
    return [*pieces, *closing]


def decoder_start(ids: Int[np.ndarray, " T"], start_id: int) -> int | None:
    """Returns the position of the first token that the decoder reads of a prompt; None if there is none.

    It is the last start token: no text becomes one, but the encoder's text may end with the same id.

    Args:
      ids: the ids of the prompt.
      start_id: the id of the start token.
    """
    (found,) = np.nonzero(ids == start_id)
    return int(found[-1]) if len(found) else None
