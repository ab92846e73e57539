"""`spt-jax remember`: makes a prompt of a text, without training."""

import sys

from spt_jax.api.remember import remember
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.commands.options import Remember
from spt_jax.data.sources import read_text
from spt_jax.data.tokenization import ControlTokens
from spt_jax.errors import DataError
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.prompts.storage import PARAMS_FILE
from spt_jax.runtime.files import shown
from spt_jax.runtime.remote import check_path, url_of
from spt_jax.runtime.sharding import make_mesh
from spt_jax.runtime.waits import spoken


def remember_text(options: Remember) -> None:
    """Writes the prompt, and prints its description."""
    check_path(options.output)
    text = read_text(options.text)
    with spoken(f"loading {options.base}"):
        base = load_base(
            options.base,
            revision=options.revision,
            dtype=options.dtype,
            quantize=options.quantize,
            mesh=make_mesh(options.mesh),
        )
    if not options.control_tokens and (note := _control_note(base, text)):
        print(note, file=sys.stderr)
    source = {"text": shown(options.text)}
    try:
        prompt = remember(
            base,
            text,
            tokens=options.tokens,
            chat_system=options.chat_system,
            control_tokens=options.control_tokens,
            source=source,
        )
    except DataError as error:
        raise DataError(f"{shown(options.text)}: {error}") from error
    prompt.save(options.output)
    print(describe_prompt(prompt))
    size = "" if url_of(options.output) else f", {(options.output / PARAMS_FILE).stat().st_size / 1e6:,.1f} MB"
    facts = prompt.info["extra"]["remembered"]
    compacted = "" if options.tokens is None else f" compacted to {options.tokens:,} positions"
    print(f"wrote {shown(options.output)}: {facts['tokens']:,} tokens{compacted}{size}")


def _control_note(base: FrozenBase, text: str) -> str | None:
    """Returns a note that the text has names of control tokens, which are not control tokens; None if it has none."""
    found = ControlTokens(base.tokenizer).pattern.findall(text)
    if not found:
        return None
    return (
        f"note: the text has {len(found)} names of control tokens, such as {found[0]!r}, which are remembered as plain"
        " text; with --control-tokens they are control tokens"
    )
