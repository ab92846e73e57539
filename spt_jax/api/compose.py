"""Composes prompts that consist of a prefix: one prompt has the prefixes of several, one after the other."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spt_jax.api.prompt import Prompt
from spt_jax.bases.base import FrozenBase
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import MESSAGES
from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import Prefix, Stream
from spt_jax.models.memory import Memory
from spt_jax.models.model import Model
from spt_jax.prompts import PrefixTuning
from spt_jax.prompts.composition import check_composable, composed
from spt_jax.prompts.storage import INFO_FILE, prompt_files
from spt_jax.prompts.virtual import VirtualPrefix, VirtualPrompt, parts_of
from spt_jax.runtime.provenance import provenance
from spt_jax.runtime.sharding import replicated


def compose(prompts: Sequence[Prompt], *, skip: int = 0) -> Prompt:
    """Returns a prompt with the prefixes of several prompts, one after the other, without training.

    The keys of each prefix are rotated to the positions after those before it. No prefix was computed with an earlier
    one in its context, so the result is not the prefix of the joint text. The template is that of the last prompt.

    Args:
      prompts: at least two prompts with the same base, each with keys and values and nothing else: remembered texts,
        and trained prefixes. All but the last are remembered texts, whose ends in the template become part of the
        prefix, or have the template of the last.
      skip: the number of positions left out at the start of every prefix but the first: 1 leaves out the BOS token of a
        remembered text, which takes much attention. By default all stay.

    Returns:
      The prompt, of the method `prefix_tuning`, which generates, trains and saves like any other.

    Raises:
      ConfigError: there are fewer than two prompts, the keys of their base cannot be moved, one has other parts than a
        prefix, the templates are not compatible, or all prefixes leave no position of the base.
    """
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompt to compose; give at least two")
    base, last = prompts[0].base, prompts[-1]
    check_composable(base)
    for number, prompt in enumerate(prompts, start=1):
        _check_part(prompt, number, base, last)
    parts = [*(_with_rest(prompt, number) for number, prompt in enumerate(prompts[:-1], start=1)), _prefix(last)]
    found = composed(base, parts, skip)
    length, positions = memory.length(found), base.layout.max_positions
    if length >= positions:
        raise ConfigError(
            f"the prefixes have {length:,} positions together and {base.name} has {positions:,}, one of which must be"
            " left; compact or leave out some"
        )
    virtual = VirtualPrompt(prefix=VirtualPrefix(found), pinned=last.virtual.pinned)
    virtual = jax.device_put(virtual, replicated(base.mesh))
    method = PrefixTuning(length=length, pin_prefix=last.virtual.pinned is True)
    extra = {"composed": {"positions": [memory.length(part) for part in parts], "skip": skip}, **provenance()}
    info = prompt_files("the composed prompt", base, method, virtual, last.template, extra=extra)[INFO_FILE]
    return Prompt(method, virtual, last.template, json.loads(info), base, last.progress)


def _check_part(prompt: Prompt, number: int, base: FrozenBase, last: Prompt) -> None:
    """Refuses a prompt that is not only a prefix, or that is not compatible with the others."""
    others = [name for name in parts_of(prompt.virtual) if name != "prefix"]
    if others or prompt.virtual.prefix is None or memory.states(prompt.virtual.prefix.memory):
        found = ", ".join(parts_of(prompt.virtual))
        raise ConfigError(
            f"prompt {number} ({prompt.method.name}) has {found}; only prompts that consist of a prefix of keys and"
            " values can be composed"
        )
    if differences := base.fingerprint.differences(prompt.fingerprint):
        raise ConfigError(
            f"prompt {number} was made for another base than {base.name}: {'; '.join(differences)}. Compose prompts on"
            " their own base"
        )
    if _remembered(prompt) is None and prompt.template != last.template:
        raise ConfigError(
            f"prompt {number} was trained with another template than the last prompt, whose template the result has;"
            " put it last, or train both with the same template"
        )
    if prompt.virtual.pinned != last.virtual.pinned:
        raise ConfigError(f"prompt {number} and the last one differ in method.pin_prefix; train them with the same")


def _prefix(prompt: Prompt) -> Memory:
    assert prompt.virtual.prefix is not None
    return prompt.virtual.prefix.memory


def _with_rest(prompt: Prompt, number: int) -> Memory:
    """Returns the prefix of a prompt that others follow, with the end of its text that is in its template."""
    own, template = _prefix(prompt), prompt.template
    if _remembered(prompt) is None:
        return own
    if f"{{{MESSAGES}}}" in template.prompt:
        raise ConfigError(
            f"prompt {number} is a system turn, which other prefixes cannot follow; put it last, or remember its text"
            " without chat_system"
        )
    rest = encoder_for(prompt.base, template).prompt_ids(dict.fromkeys(template.prompt_fields, ""))
    if not len(rest):
        return own
    added = _memory_after(prompt.base.model, own, jnp.asarray(rest))
    return memory.concatenate(own, added)


def _remembered(prompt: Prompt) -> Mapping[str, Any] | None:
    """Returns the facts about the text of a remembered text; None for another prompt."""
    return prompt.info.get("extra", {}).get("remembered")


@jax.jit
def _memory_after(model: Model, prefix: Memory, ids: jax.Array) -> Memory:
    """Returns what all layers remember of ids that follow a prefix, float32."""
    count = memory.length(prefix)
    positions = count + jnp.arange(ids.shape[0], dtype=jnp.int32)[None]
    stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions), ids=ids[None])
    _, found = model.run(
        model.embed(ids[None]), stream, Prefix(prefix, jnp.arange(count)), return_memory=True, return_hidden=False
    )
    assert found is not None
    return jax.tree.map(lambda array: array[:, 0].astype(jnp.float32), found)
