"""Solved examples that precede a prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spt_jax.data.templates import DECODER, Bos, Field, Piece, Plain, Template, Text, parse
from spt_jax.data.values import field_text
from spt_jax.errors import DataError, did_you_mean

# The mask token in a prompt, whatever the tokenizer calls it.
MASK = "<mask>"
# Follows each solved example of a few-shot prompt, and so also ends a generated answer.
SEPARATOR = "\n\n"


def solved(template: Template, record: Mapping[str, Any], side: str) -> list[Piece]:
    """Returns the prompt or the target of a solved example, with its class as a verbalizer.

    Args:
      template: the template.
      record: the record.
      side: the template's prompt or target.

    Raises:
      DataError: a field is missing, or the label has no verbalizer.
    """
    known = dict(record)
    if template.verbalizers:
        name = template.label_field or ""
        label = field_text(record, name, 0)
        if label not in template.verbalizers:
            hint = did_you_mean(label, template.verbalizers)
            raise DataError(f"a solved example's label {label!r} has no verbalizer; {hint}")
        known[name] = template.verbalizers[label]
    return [Plain(field_text(known, p.name, 0)) if isinstance(p, Field) else p for p in parse(side)]


def with_shots(
    template: Template,
    shots: Sequence[Mapping[str, Any]],
    prompt: Sequence[Piece],
    ids_of: Callable[..., list[int]],
    mask: str | None = None,
) -> list[Piece | int]:
    """Returns the pieces of a prompt after those of solved examples, whose targets are encoded separately.

    Args:
      template: the template.
      shots: the records of the solved examples.
      prompt: the pieces of the prompt.
      ids_of: encodes pieces, given the fields and whether they open a sequence.
      mask: the name of the mask token that answers replace; None if they follow the prompt.

    Raises:
      DataError: a field of a record is missing, or its label has no verbalizer.
    """
    pieces: list[Piece | int] = []
    for record in shots:
        prompt_side = template.prompt.replace(DECODER, "")
        if mask is not None:
            prompt_side = prompt_side.replace(MASK, template.target).replace(mask, template.target)
        question = [piece for piece in solved(template, record, prompt_side) if piece != Bos()]
        answer = [] if mask is not None else ids_of(solved(template, record, template.target), {}, opens=False)
        pieces += [*question, *answer, Text(SEPARATOR)]
    front = 1 if prompt[:1] == [Bos()] else 0
    return [*prompt[:front], *pieces, *prompt[front:]]
