"""Makes a prompt of a text without training: the keys, values and states that the base computes for it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spt_jax.api.prompt import Prompt
from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.data.remembered import Remembered, remembered_system, remembered_text
from spt_jax.errors import ConfigError
from spt_jax.prompts import Method, PrefixTuning, StateTuning
from spt_jax.prompts.compaction import check_compactable, compact
from spt_jax.prompts.prefix_tuning import memory_of_rows
from spt_jax.prompts.storage import INFO_FILE, prompt_files
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt
from spt_jax.runtime.provenance import provenance
from spt_jax.runtime.sharding import replicated
from spt_jax.runtime.waits import spoken


def remember(
    base: FrozenBase | str | Path,
    text: str,
    *,
    tokens: int | None = None,
    chat_system: bool = False,
    control_tokens: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Prompt:
    """Returns a prompt whose prefix is what the base computes for a text, so that requests continue the text.

    The log-probabilities after the prefix are those after the text itself. Nothing is trained: the prefix has the keys
    and values of all tokens of the text, with BOS if the tokenizer adds one, at their positions, and the states of
    recurrent layers after the last of them. Windows of sliding-window layers hide the tokens that they hide in a text.

    Args:
      base: the frozen base, or what `load_base` takes.
      text: the text. Blanks and newlines at its ends are part of it.
      tokens: the number of positions to compact the text to, fewer than its tokens, by attention matching (arXiv
        2602.16284): in each head, the keys that pieces of the text attend to most are kept, and their values are fitted
        so that the outputs of attention stay the same. The log-probabilities are then no longer exactly those after the
        text. Only for bases with RoPE and full attention in all layers.
      chat_system: whether the text is the system turn of the base's chat template, and requests are the turns after it.
        Otherwise a request is a text that continues the text, in the field `text`.
      control_tokens: whether names of control tokens in the text are control tokens, as in a chat that was already
        rendered. Otherwise they are plain text, as in fields of records. Not for chat_system.
      source: JSON to store with the prompt, such as the path of the text.
      progress: whether to say on stderr what takes longer than a second.

    Returns:
      The prompt, of the method `prefix_tuning`, or `state_tuning` if no layer of the base has keys and values.

    Raises:
      ConfigError: the base has an encoder, or its layers take no keys, values or states, or its chat template is
        missing or does not begin every chat with the system turn; or `tokens` is not less than those of the text, or
        the base's layers cannot be compacted.
      DataError: the text is empty, cannot be encoded, or is too long for the base.
      CheckpointError: the base cannot be read.
    """
    if chat_system and control_tokens:
        raise ConfigError("control_tokens is set, and the text of a system turn is plain text; leave it out")
    if not isinstance(base, FrozenBase):
        with spoken(f"loading {base}", shown=progress):
            base = load_base(base)
    if base.layout.only_tokens:
        raise ConfigError(f"{base.name} takes input embeddings only: it has no keys, values or states to remember")
    if not base.layout.causal:
        raise ConfigError(f"{base.name} has an encoder: its keys and values of a text depend on what follows the text")
    if tokens is not None:
        check_compactable(base)
        if tokens < 1:
            raise ConfigError(f"tokens is {tokens}; a text is compacted to at least 1 position")
    found = remembered_system(base, text) if chat_system else remembered_text(base, text, control_tokens=control_tokens)
    if tokens is not None and tokens >= len(found.ids):
        raise ConfigError(f"tokens is {tokens:,}, and the text has {len(found.ids):,}; give fewer, or leave it out")
    with spoken(f"encoding {len(found.ids):,} tokens", shown=progress):
        virtual = _virtual(base, found, tokens)
    extra = {
        "remembered": {
            "tokens": len(found.ids),
            "compacted_to": tokens,
            "characters": len(text),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "chat_system": chat_system,
            "control_tokens": control_tokens,
            **(source or {}),
        },
        **provenance(),
    }
    method = _method(base, tokens or len(found.ids))
    info = prompt_files("the remembered text", base, method, virtual, found.template, extra=extra)[INFO_FILE]
    return Prompt(method, virtual, found.template, json.loads(info), base, progress)


def _method(base: FrozenBase, length: int) -> Method:
    if not base.layout.attention_groups:
        return StateTuning()
    return PrefixTuning(length=length, states=bool(base.layout.state_groups))


def _virtual(base: FrozenBase, found: Remembered, tokens: int | None) -> VirtualPrompt:
    """Returns the memory of the ids, or what it is compacted to, as a prompt, replicated over the mesh of the base."""
    ids = jnp.asarray(found.ids)
    memory = memory_of_rows(base.model, base.model.embed(ids), ids)
    if tokens is not None:
        memory = compact(base, found.ids, memory, tokens)
    return jax.device_put(VirtualPrompt(prefix=VirtualPrefix(memory)), replicated(base.mesh))
